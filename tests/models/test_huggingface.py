"""Models of transformers, new and stored, whole and with adapters of peft."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from dpsgd import losses
from dpsgd.engines import Ghost, Vmap
from dpsgd.models import MLP, huggingface
from dpsgd.models.hf_folder import is_huggingface, save_folder
from dpsgd.testing import assert_engines_agree

GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 8}
LORA = {"r": 2, "alpha": 4, "target_modules": ["c_attn", "c_proj"]}
WIDE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
VOCABULARY, CLASSES = 19, 3


def lm(kind="gpt2", config=GPT2, vocab_size=VOCABULARY, length=8, **options):
    return huggingface("causal_lm", [length], vocab_size, vocab_size, kind, config, **options)


def sequences(size=4):
    """Ids and labels, with padding of several lengths."""
    x = torch.randint(VOCABULARY, (size, 8))
    lengths = torch.arange(size) % 4 + 3
    return x, torch.where(torch.arange(8) < lengths[:, None], x, losses.IGNORED)


def randomised(model):
    """Adapters start at zero, which would hide half of their gradients."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    "lora",
    [None, LORA, {**LORA, "target_modules": ["c_fc", "wte", "lm_head"]}],
    ids=["full", "lora", "lora_of_embeddings"],
)
def test_engines_agree_with_the_loop(lora):
    model = randomised(lm(lora=lora)).double()
    verdicts = assert_engines_agree(model, losses.causal_lm, sequences(), [Ghost, Vmap], rtol=1e-10)
    assert verdicts == {"Ghost": "agrees", "Vmap": "agrees"}


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_classifiers_of_sequences(lora):
    config = {**GPT2, "pad_token_id": 0}
    model = huggingface("sequence_classification", [8], CLASSES, VOCABULARY, "gpt2", config,
                        lora=lora)  # fmt: skip
    batch = sequences()[0], torch.randint(CLASSES, (4,))
    assert model(batch[0]).logits.shape == (4, CLASSES)
    assert_engines_agree(
        randomised(model).double(), losses.cross_entropy, batch, [Ghost], rtol=1e-10
    )


def test_classifiers_of_images():
    config = {**WIDE, "image_size": 8, "patch_size": 4, "num_channels": 1}
    model = huggingface("image_classification", [1, 8, 8], CLASSES, None, "vit", config)
    batch = torch.rand(4, 1, 8, 8).double(), torch.randint(CLASSES, (4,))
    assert_engines_agree(model.double(), losses.cross_entropy, batch, [Ghost], rtol=1e-10)


def test_only_adapters_are_trained():
    model = lm(lora=LORA)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_fields_left_out_follow_those_given():
    """num_key_value_heads of a Llama is num_attention_heads unless given."""
    assert lm("llama", WIDE).config.num_key_value_heads == 2


def test_vocabulary_comes_from_the_data_and_special_tokens_lie_in_it():
    config = lm().config
    assert config.vocab_size == VOCABULARY
    assert config.bos_token_id is None
    assert lm(config={**GPT2, "eos_token_id": 3}).config.eos_token_id == 3


def test_dropout_is_that_of_the_library():
    assert lm().config.resid_pdrop == 0.1
    model, (x, _) = lm(), sequences()
    assert not torch.equal(model(x).logits, model(x).logits)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_no_cache_in_training_but_generate_works(lora):
    model = lm(lora=lora)
    assert model(sequences()[0]).past_key_values is None
    prompt = torch.tensor([[1, 2]])
    made = model.eval().generate(input_ids=prompt, max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 5)
    assert made[0, 2] == model(prompt).logits[0, -1].argmax()


def stored(path, **options):
    model = lm(**options).eval()
    save_folder(model, path / "hf")
    return model, str(path / "hf")


def test_a_stored_model_has_its_weights(tmp_path):
    model, path = stored(tmp_path)
    again = lm(None, {"resid_pdrop": 0.0}, path=path)
    assert again.training
    assert again.config.resid_pdrop == 0.0
    x, _ = sequences()
    assert torch.equal(again.eval()(x).logits, model(x).logits)


def test_the_folder_is_a_plain_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, path = stored(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    x, _ = sequences()
    assert torch.equal(again(x).logits, model(x).logits)
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_adapters_are_a_plain_folder_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    base = lm()
    _, path = stored(tmp_path)
    model = randomised(lm(None, None, path=path, lora=LORA)).eval()
    save_folder(model, tmp_path / "adapters")
    assert sorted(p.name for p in (tmp_path / "adapters").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    base = lm(None, None, path=path).eval()
    x, _ = sequences()
    plain = base(x).logits.clone()
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapters"))
    torch.testing.assert_close(again(x).logits, model(x).logits)
    assert not torch.allclose(plain, model(x).logits)


def test_the_same_adapters_give_the_same_bytes(tmp_path):
    model = lm(lora=LORA)
    for name in ("a", "b"):
        save_folder(copy.deepcopy(model), tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_which_models_are_hugging_faces():
    assert is_huggingface(lm())
    assert is_huggingface(lm(lora=LORA))
    assert not is_huggingface(MLP([4], 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": None}, "model.type=gpt2 or another kind"),
        ({"kind": "gtp2"}, "got 'gtp2'. Did you mean gpt2"),
        ({"config": {"n_layers": 3}}, "takes no 'n_layers'.*Did you mean n_layer"),
        ({"config": {"n_embd": 15, "n_head": 2}}, "divisible by num_heads"),
        ({"config": {"n_embd": "wide"}}, "the configuration of a gpt2.*n_embd"),
        ({"kind": "vit", "config": None}, "a vit with head=causal_lm"),
        ({"vocab_size": None}, "vocab_size, token ids, for a language model"),
        ({"length": 9}, "at least 9 positions.*got 8"),
        ({"config": {**GPT2, "vocab_size": 4}}, "at least the 19 tokens of data.vocab_size, got 4"),
        ({"path": "/no/such/folder"}, "Nothing is downloaded"),
        ({"lora": {"rank": 3}}, "no lora.rank. It takes r, alpha, dropout, target_modules"),
        ({"lora": {"r": 0}}, "lora.r to be a positive integer, got 0"),
        ({"lora": {"dropout": 1.0}}, "0 <= lora.dropout < 1"),
        ({"lora": {"alpha": 0}}, "lora.alpha > 0"),
        ({"lora": {"target_modules": "c_attn"}}, "a list of module names, got 'c_attn'"),
        (
            {"lora": {"target_modules": ["q_proj"]}},
            "got 'q_proj'. The model has .*c_attn, c_proj, c_fc",
        ),
        ({"lora": {"target_modules": ["ln_1"]}}, "modules with a weight matrix"),
    ],
)
def test_mistakes_are_explained(options, words):
    with pytest.raises(ValueError, match=words):
        lm(**options)


def test_an_unknown_head_lists_the_choices():
    with pytest.raises(ValueError, match="causal_lm, sequence_classification, image_class"):
        huggingface("lm", [8], 3, 3, "gpt2")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_size": 50}, "at least the 50 tokens"),
        ({"kind": "llama"}, "Expected a llama .* got a gpt2"),
        ({"config": {"n_layer": 1}}, r"transformer\.h\.1.* not in both"),
        ({"config": {"n_layer": 3}}, r"transformer\.h\.2.* not in both"),
        ({"config": {"n_embd": 32}}, "mismatched_sizes"),
        ({"config": {"dropout": 0}}, "takes no 'dropout'.*Did you mean"),
    ],
)
def test_a_stored_model_that_does_not_fit(options, words, tmp_path):
    _, path = stored(tmp_path)
    with pytest.raises(ValueError, match=words):
        lm(**{"kind": None, "config": None, "path": path, **options})


def test_damaged_weights_are_refused(tmp_path):
    _, path = stored(tmp_path)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="Cannot make a model with head=causal_lm"):
        lm(None, None, path=path)


def test_pickles_are_refused(tmp_path):
    model, path = stored(tmp_path)
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Cannot make a model with head=causal_lm"):
        lm(None, None, path=path)


@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_without_the_libraries(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"Expected the {name} .*pip install 'dpsgd\[hf\]'"):
        lm(lora=LORA)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_what_is_an_encoder_by_default_predicts_without_seeing_ahead(kind):
    model = huggingface("causal_lm", [8], 30, 30, type=kind, config={"num_hidden_layers": 1})
    ids = torch.zeros(2, 8, dtype=torch.long)
    ids[1, 5:] = 3
    with torch.no_grad():
        one, other = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(one[:5], other[:5])
    assert (one[5:] - other[5:]).abs().max() > 1e-3


def test_a_model_that_sees_what_it_predicts_is_refused(monkeypatch):
    from dpsgd.models import hf

    monkeypatch.setattr(hf, "_suit", lambda settings, head: None)
    with pytest.raises(ValueError, match="see the tokens that they predict"):
        huggingface("causal_lm", [8], 30, 30, type="bert", config={"num_hidden_layers": 1})


def test_a_classifier_without_padding_is_refused():
    with pytest.raises(ValueError, match=r"model\.config\.pad_token_id=NUMBER"):
        huggingface("sequence_classification", [8], 3, 30, type="gpt2", config={"n_layer": 1})
