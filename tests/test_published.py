"""The settings of the literature are what was published, and run on made-up miniatures."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from dpsgd.config import config_dir, resolve
from dpsgd.train import train

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")
pytest.importorskip("peft")

ROOT = Path(__file__).parent.parent
TF_ROWS = {  # noise multiplier: the settings and the epsilon of a row of the tutorial
    1.3: ({"optimizer.lr": 0.25, "clipping.max_grad_norm": 1.5, "trainer.epochs": 15}, 1.19),
    1.1: ({"optimizer.lr": 0.15, "clipping.max_grad_norm": 1.0, "trainer.epochs": 60}, 3.01),
    0.7: ({"optimizer.lr": 0.25, "clipping.max_grad_norm": 1.5, "trainer.epochs": 45}, 7.10),
}
IMAGES = {"data.train_split": "train", "data.test_split": "test", "optimizer.momentum": 0.0}
CIFAR = {
    **IMAGES,
    "data.input_column": "img",
    "data.public_size": 50000,
    "model.width": 4,
    "model.groups": 16,
    "model.weight_standardisation": True,
    "augmentation._target_": "dpsgd.augmentation.CropFlip",
    "augmentation.multiplicity": 16,
    "augmentation.padding": 4,
    "clipping._target_": "dpsgd.clipping.UnitNorm",
    "clipping.max_grad_norm": 1.0,
    "sampler.expected_batch_size": 4096,
    "trainer.num_steps": 2500,
    "trainer.ema_decay": 0.9999,
    "optimizer.lr": 4.0,
    "privacy.target_delta": 1e-5,
}
TEXT = {
    "data.column": "sentence",
    "data.public_size": 67349,
    "data.test_split": "validation",
    "data.padding": 1,
    "data.vocab_size": 50265,
    "schedule._target_": "dpsgd.learning_rates.linear",
    "privacy.target_epsilon": 8.0,
}
PUBLISHED = {
    "mnist_opacus": {
        **IMAGES,
        "data.public_size": 60000,
        "data.mean": 0.1307,
        "data.std": 0.3081,
        "sampler.sample_rate": 0.004,
        "privacy.noise_multiplier": 1.3,
        "privacy.target_delta": 1e-5,
        **TF_ROWS[1.3][0],
    },
    "mnist_tf_privacy": {
        **IMAGES,
        "data.public_size": 60000,
        "data.mean": None,
        "sampler.expected_batch_size": 256,
        "privacy.noise_multiplier": 1.1,
        "privacy.target_delta": 1e-5,
        **TF_ROWS[1.1][0],
    },
    "cifar10_wrn16_4": {**CIFAR, "model.depth": 16, "privacy.noise_multiplier": 3.0},
    "cifar10_wrn40_4": {**CIFAR, "model.depth": 40, "privacy.target_epsilon": 8.0},
    "sst2_full": {
        **TEXT,
        "model.lora": None,
        "optimizer._target_": "torch.optim.Adam",
        "optimizer.lr": 5e-4,
        "optimizer.eps": 1e-8,
        "schedule.warmup": 0.0,
        "clipping.max_grad_norm": 0.1,
        "sampler.expected_batch_size": 1000,
        "trainer.epochs": 3,
        "privacy.target_delta": 7.424e-6,
    },
    "sst2_lora": {
        **TEXT,
        "model.lora.r": 16,
        "optimizer._target_": "torch.optim.AdamW",
        "optimizer.lr": 1e-3,
        "optimizer.eps": 1e-6,
        "optimizer.weight_decay": 0.01,
        "schedule.warmup": 0.06,
        "clipping.max_grad_norm": 10.0,
        "sampler.expected_batch_size": 2000,
        "trainer.epochs": 50,
        "privacy.target_delta": 1e-5,
    },
}


def composed(name, *overrides):
    words = [f"experiment={name}", *overrides]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return resolve(compose("train", overrides=words), words)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_settings_are_those_published(name):
    config = composed(name)
    assert {key: OmegaConf.select(config, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def commands():
    page = ROOT / "experiments" / "published" / "README.md"
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.S | re.M):
        for line in block.splitlines():
            yield shlex.split(line)[3:]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_commands_of_the_page_compose(words):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        resolve(compose("train", overrides=words), words)


# Runs on miniatures


def images(path, column, size, mode):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    shape = (size, size) if mode == "L" else (size, size, 3)
    pixels = [torch.randint(256, shape, generator=generator).byte().numpy() for _ in range(12)]
    labels = datasets.ClassLabel(num_classes=10)
    table = datasets.Dataset.from_dict(
        {column: [Image.fromarray(p, mode) for p in pixels], "label": [n % 10 for n in range(12)]},
        features=datasets.Features({column: datasets.Image(), "label": labels}),
    )
    table.to_parquet(path)
    return path


def sentences(path):
    words = ["good film", "a bad film", "good", "not good at all", "a film", "bad bad film"] * 2
    table = {"idx": list(range(12)), "sentence": words, "label": [1, 0, 1, 0, 1, 0] * 2}
    datasets.Dataset.from_dict(table).to_parquet(path)
    return path


def classifier(folder):
    """A tiny RoBERTa with its tokenizer, as `save_pretrained` writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, RobertaConfig
    from transformers import RobertaForSequenceClassification as Roberta

    words = ["<s>", "<pad>", "</s>", "<unk>", "good", "bad", "film", "a", "not", "at", "all"]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = RobertaConfig(
        vocab_size=11, num_attention_heads=2, max_position_embeddings=10, pad_token_id=1, **sizes
    )
    Roberta(config).save_pretrained(folder)
    return folder


def run(name, tmp_path, data, *overrides):
    small = (f"data.path={data}", f"data.test_path={data}", "data.public_size=12")
    small += ("sampler.expected_batch_size=6", "trainer.num_steps=2", "device=cpu")
    config = composed(name, *small, "accountant=rdp", *overrides)
    report = train(config, tmp_path / "run", Console(quiet=True))
    assert report["steps"] == 2
    assert math.isfinite(report["test"]["test_loss"])
    assert 0 <= report["test"]["test_accuracy"] <= 1


@pytest.mark.parametrize("name", ["mnist_opacus", "mnist_tf_privacy"])
def test_mnist_runs(name, tmp_path):
    run(name, tmp_path, images(tmp_path / "mini.parquet", "image", 28, "L"))


@pytest.mark.parametrize(
    "name", ["cifar10_wrn16_4", pytest.param("cifar10_wrn40_4", marks=pytest.mark.slow)]
)
def test_cifar10_runs(name, tmp_path):
    data = images(tmp_path / "mini.parquet", "img", 32, "RGB")
    run(name, tmp_path, data, "augmentation.multiplicity=2", "model.width=1")


@pytest.mark.parametrize("name", ["sst2_full", "sst2_lora"])
def test_sst2_runs(name, tmp_path):
    folder = classifier(tmp_path / "model")
    sizes = ("data.vocab_size=11", "data.input_shape=[6]")
    run(name, tmp_path, sentences(tmp_path / "mini.parquet"), f"model.path={folder}", *sizes)
