"""Language models from the command line: trained, judged, saved, loaded, generating."""

from __future__ import annotations

import json
import math

import pytest
import torch
from command_line import command

import dpsgd
from dpsgd.data.stories import encode
from dpsgd.run_directory import read_report
from dpsgd.saved_run import load_run

TINY = (
    "model=hf", "model.type=gpt2", "model.config={n_layer: 2, n_embd: 16, n_head: 2}",
    "data=stories", "data.public_size=64", "data.num_test=20", "loss=causal_lm",
    "trainer.num_steps=2", "trainer.evaluate_every=1", "optimizer=adam", "device=cpu",
)  # fmt: skip
LORA = "model.lora={r: 2, alpha: 4, target_modules: [c_attn]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of all weights, a model of adapters upon it, and one of bytes."""
    path = tmp_path_factory.mktemp("language models")
    command(*TINY, "run.dir=full", cwd=path)
    begun = ("model.path=full/hf", "model.type=null", "model.config=null")
    command(*TINY, *begun, LORA, "run.dir=lora", cwd=path)
    return path


def test_perplexity_stands_where_accuracy_stood(folder):
    report = read_report(folder / "full")
    assert set(report["test"]) == {"test_loss", "test_perplexity"}
    assert len(report["history"]) == 2
    assert 150 < report["test"]["test_perplexity"] < 300  # 230 words, hardly trained
    page = (folder / "full" / "report.html").read_text()
    assert "Test perplexity against epsilon" in page
    assert f"{report['test']['test_perplexity']:.2f}" in page
    metrics = (folder / "full" / "metrics.jsonl").read_text()
    assert "test/perplexity" in metrics
    assert "accuracy" not in page + metrics


def test_the_terminal_shows_perplexity(tmp_path):
    done = command(*TINY, "trainer.num_steps=1", "run.dir=x", cwd=tmp_path)
    assert "test perplexity" in done.stdout
    assert "accuracy" not in done.stdout


def test_a_run_is_read_back_and_generates(folder):
    run = load_run(folder / "full")
    made = run.model.generate(encode("on friday"), max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)


def test_the_folder_of_a_run_is_the_model(folder):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "full" / "hf")
    x = encode("on friday")
    expected = load_run(folder / "full").model(x).logits
    torch.testing.assert_close(model(x).logits, expected)


def test_the_folder_of_adapters_is_pefts(folder, monkeypatch):
    import peft
    import transformers

    monkeypatch.chdir(folder)  # the run names its base by a relative path
    run = load_run("lora")
    base = transformers.AutoModelForCausalLM.from_pretrained("full/hf")
    model = peft.PeftModel.from_pretrained(base, "lora/hf")
    x = encode("on friday")
    torch.testing.assert_close(model(x).logits, run.model(x).logits)


def test_adapters_leave_the_base_as_it_was(folder, monkeypatch):
    monkeypatch.chdir(folder)
    base, adapted = load_run("full").model, load_run("lora").model
    for name, weight in base.named_parameters():
        path = name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        kept = dict(adapted.base_model.model.named_parameters(remove_duplicate=False))
        assert torch.equal(kept.get(path, kept.get(name)), weight), name
    trained = [p for n, p in adapted.named_parameters() if "lora_B" in n]
    assert all(p.any() for p in trained)
    assert load_run("lora").report["parameters"] == sum(
        p.numel() for n, p in adapted.named_parameters() if "lora_" in n
    )


def test_the_report_vouches_for_the_folder(folder, tmp_path):
    files = read_report(folder / "lora")["files"]
    assert {"hf/adapter_config.json", "hf/adapter_model.safetensors"} <= set(files)
    assert {"hf/config.json", "hf/model.safetensors"} <= set(read_report(folder / "full")["files"])


def test_a_damaged_folder_is_noticed(tmp_path):
    command(*TINY, "trainer.num_steps=1", "run.dir=x", cwd=tmp_path)
    (tmp_path / "x" / "hf" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"hf/config\.json' is another one"):
        load_run(tmp_path / "x")


def test_text_as_bytes(tmp_path):
    (tmp_path / "lines.txt").write_text("to be or not to be\n" * 30)
    data = (
        "data=text", "data.path=lines.txt", "data.test_path=lines.txt", "data.input_shape=[12]",
        "data.public_size=30",
    )  # fmt: skip
    arguments = [word for word in TINY if not word.startswith("data")]
    command(*arguments, *data, "run.dir=x", cwd=tmp_path)
    report = json.loads((tmp_path / "x" / "report.json").read_text())
    found = report["test"]  # all lines are of one length here
    assert math.log(found["test_perplexity"]) == pytest.approx(found["test_loss"], rel=1e-5)


def test_a_classifier_of_images_is_judged_by_accuracy(tmp_path):
    small = (
        "{hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2, "
        "image_size: 8, patch_size: 4, num_channels: 1}"
    )
    command(
        "model=hf", "model.head=image_classification", "model.type=vit", f"model.config={small}",
        "trainer.num_steps=1", "device=cpu", "run.dir=x", cwd=tmp_path,
    )  # fmt: skip
    assert "test_accuracy" in dpsgd.load_run(tmp_path / "x").report["test"]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["model.type=null"], "model.path=DIRECTORY"),
        (["model.config={n_layers: 1}"], "Did you mean n_layer"),
        (["model.lora={target_modules: [q_proj]}"], "got 'q_proj'. The model has"),
        (["model.path=nowhere"], "Nothing is downloaded"),
        (["loss=cross_entropy"], "Move the classes to dimension 1"),
        (["data=digits"], "a vocab_size, token ids"),
    ],
)
def test_mistakes_give_one_readable_message(typed, words, tmp_path):
    keys = {word.partition("=")[0] for word in typed}
    arguments = [word for word in TINY if word.partition("=")[0].partition(".")[0] not in keys]
    arguments = [word for word in arguments if word.partition("=")[0] not in keys]
    done = command(*arguments, *typed, "run.dir=x", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()
