"""Classifiers of transformers attend to no padding, whoever calls them, under every engine."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from dpsgd import losses
from dpsgd.data import Dataset
from dpsgd.engines import Ghost, Hooks, Loop, Vmap
from dpsgd.evaluate import evaluate
from dpsgd.models import huggingface
from dpsgd.models.attention import AttentionMask
from dpsgd.models.hf_folder import save_folder
from dpsgd.testing import assert_engines_agree

pytest.importorskip("transformers")
PADDING, VOCABULARY, LENGTH = 3, 20, 8
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LARGE = {"initializer_range": 0.5}  # with the default, attention is too even to show a difference
CONFIGS = {
    "bert": {**SIZES, **NO_DROPOUT},
    "roberta": {**SIZES, **NO_DROPOUT, "max_position_embeddings": 16},
    "distilbert": {
        "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24,
        "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
    },
    "deberta-v2": {**SIZES, **NO_DROPOUT},
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2},
}  # fmt: skip
CONFIGS["gpt2"] |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS = {kind: {**config, **LARGE} for kind, config in CONFIGS.items()}


def classifier(kind, padding=PADDING, config=None, **options):
    torch.manual_seed(0)
    config = CONFIGS[kind] if config is None else config
    options = {"type": kind, "config": config, "padding": padding, **options}
    return huggingface("sequence_classification", [LENGTH], 2, VOCABULARY, **options)


def batch(size=4):
    """Ids that end in padding, from another place in each sample; one has none."""
    x = torch.randint(PADDING + 1, VOCABULARY, (size, LENGTH))
    for row in range(size - 1):
        x[row, 2 + row :] = PADDING
    return x, torch.randint(2, (size,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_padded_sequence_has_the_scores_of_the_sequence(kind, dtype, tolerance):
    model, (x, _) = classifier(kind).to(dtype).eval(), batch()
    scores = model(x).logits
    for row in range(3):
        alone = model(x[row : row + 1, : 2 + row]).logits
        torch.testing.assert_close(scores[row : row + 1], alone, rtol=tolerance, atol=tolerance)


def test_without_a_mask_the_library_attends_to_padding():
    """What would be wrong otherwise: the check above sees it."""
    model, (x, _) = classifier("bert").double().eval(), batch()
    everything = torch.ones_like(x)
    attending = model(x, attention_mask=everything).logits
    assert (attending[:3] - model(x).logits[:3]).abs().max() > 1e-2
    torch.testing.assert_close(attending[3:], model(x).logits[3:])


@pytest.mark.parametrize(
    ("kind", "engines"),
    [
        ("bert", [Ghost, Vmap]),
        ("roberta", [Ghost, Vmap, Hooks]),
        ("distilbert", [Ghost, Vmap]),
        ("deberta-v2", [Ghost]),
        ("gpt2", [Ghost]),
    ],
)
def test_engines_agree_with_the_loop(kind, engines):
    model = classifier(kind).double()
    verdicts = assert_engines_agree(model, losses.cross_entropy, batch(), engines, rtol=1e-10)
    assert set(verdicts.values()) == {"agrees"}


def test_adapters_attend_to_no_padding():
    model = classifier("bert", lora={"r": 2}).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    x, _ = batch()
    torch.testing.assert_close(model.eval()(x).logits[:1], model(x[:1, :2]).logits)
    assert_engines_agree(model.train(), losses.cross_entropy, batch(), [Ghost, Vmap], rtol=1e-10)


def test_the_ghost_engine_takes_one_pass_whatever_is_padded():
    """A mask that the model looks into would split the batch by whether something is padded."""
    model = classifier("bert")
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    engine = Ghost(model, losses.cross_entropy)
    engine(batch())
    calls.clear()
    engine(batch())
    assert len(calls) == 1


def test_evaluation_attends_to_no_padding():
    model, (x, y) = classifier("bert").double(), batch()
    data = Dataset((x, y), (x, y), [LENGTH], 2, 4, VOCABULARY, padding=PADDING)
    padded = evaluate(model, losses.cross_entropy, data)
    model.eval()
    alone = [x[row : row + 1, : 2 + row if row < 3 else LENGTH] for row in range(4)]
    found = [losses.cross_entropy(model, (ids, y[row : row + 1])) for row, ids in enumerate(alone)]
    assert padded["test_loss"] == pytest.approx(float(torch.cat(found).mean()), abs=1e-10)
    right = [int(model(ids).logits.argmax()) == int(y[row]) for row, ids in enumerate(alone)]
    assert padded["test_accuracy"] == sum(right) / 4


def test_a_sample_of_padding_alone_has_finite_gradients():
    x = torch.full((2, LENGTH), PADDING)
    grads = Loop(classifier("bert"), losses.cross_entropy)((x, torch.tensor([0, 1])))
    assert grads.norms().isfinite().all()


def test_a_mask_that_is_given_is_taken():
    mask, model = AttentionMask(PADDING, boolean=False), torch.nn.Identity()
    x, _ = batch()
    assert mask(model, (x,), {"attention_mask": 1})[1] == {"attention_mask": 1}
    assert mask(model, (), {"inputs_embeds": 1})[1] == {"inputs_embeds": 1}
    got = mask(model, (), {"input_ids": x, "attention_mask": None})[1]["attention_mask"]
    assert torch.equal(got.bool(), x != PADDING)


@pytest.mark.parametrize("boolean", [True, False])
def test_the_first_position_is_always_attended_to(boolean):
    mask = AttentionMask(PADDING, boolean).of(torch.full((2, 3), PADDING))
    assert mask.flatten().tolist() == [1, 0, 0] * 2


def test_it_survives_copies_and_pickles():
    model, (x, _) = classifier("bert").eval(), batch()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x).logits, model(x).logits)


def test_a_stored_model_knows_its_padding(tmp_path):
    save_folder(classifier("bert"), tmp_path / "hf")
    options = {"path": str(tmp_path / "hf"), "type": None, "config": NO_DROPOUT}
    model, (x, _) = classifier("bert", **options, padding=None).eval(), batch()
    torch.testing.assert_close(model(x).logits[:1], model(x[:1, :2]).logits)
    with pytest.raises(ValueError, match=r"token 5, got 3. .*data.padding=3"):
        classifier("bert", **options, padding=5)


def test_nobody_knows_the_padding():
    with pytest.raises(ValueError, match="to know which token is padding"):
        classifier("gpt2", padding=None)


def test_a_model_that_cannot_be_kept_from_padding_is_refused():
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
    with pytest.raises(ValueError, match="got a xlnet whose scores change with it"):
        classifier("xlnet", config=sizes)
