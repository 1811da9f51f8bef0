"""Every data configuration builds, and with every model that can read it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dpsgd.data import Dataset

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
MODELS = [name for name in MODELS if name not in ("hf", "tutorial_cnn")]  # the latter: larger ones
TOKENS = {"kind": "tokens", "input_shape": [12], "vocab_size": 20}


def compose(data, model="linear", **changes):
    config = OmegaConf.create(
        {
            "data": OmegaConf.load(CONFIGS / "data" / f"{data}.yaml"),
            "model": OmegaConf.load(CONFIGS / "model" / f"{model}.yaml"),
        }
    )
    config.data = OmegaConf.merge(config.data, changes)
    return config


@pytest.mark.parametrize("name", DATA)
def test_every_data_set_declares_its_schema(name):
    keys = OmegaConf.load(CONFIGS / "data" / f"{name}.yaml").keys()
    assert {"input_shape", "num_classes", "public_size", "vocab_size"} <= set(keys)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(
            (n, k)
            for n in ("tensors", "hf", "text", "labelled_text")
            for k in ("path", "input_shape", "public_size")
        ),
        ("tensors", "num_classes"),
        ("hf", "num_classes"),
        ("labelled_text", "num_classes"),
    ],
)
def test_what_must_be_declared(name, key):
    assert OmegaConf.is_missing(compose(name).data, key)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
@pytest.mark.parametrize("model", MODELS)
def test_images_with_every_model(name, model):
    config = compose(name, model)
    data = instantiate(config.data)
    assert isinstance(data, Dataset)
    x, _ = data.take(torch.arange(3))
    assert instantiate(config.model)(x).shape == (3, 10)


@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_tokens_with_sequence_models(model):
    config = compose("synthetic", model, **TOKENS)
    x, _ = instantiate(config.data).take(torch.arange(3))
    assert instantiate(config.model)(x).shape == (3, 10)


def test_stories_with_a_language_model():
    changes = {"type": "gpt2", "config": {"n_layer": 1, "n_embd": 8, "n_head": 2}}
    config = compose("stories", "hf", num_train=5)
    config.model = OmegaConf.merge(config.model, changes)
    x, y = instantiate(config.data).take(torch.arange(3))
    assert instantiate(config.model)(x).logits.shape == (*y.shape, 230)


def test_synthetic_training_size_follows_the_public_size():
    assert len(instantiate(compose("synthetic", public_size=7).data)) == 7


def test_tensors(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 6)), y=np.zeros(4, dtype=int))
    declared = {"input_shape": [2, 3], "num_classes": 2, "public_size": 4}
    data = instantiate(compose("tensors", path=str(tmp_path / "data.npz"), **declared).data)
    assert data.input_shape == (2, 3)


def test_hf(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "data.csv").write_text("a,b,label\n0.5,1,0\n1.5,2,1\n")
    declared = {"input_shape": [2], "num_classes": 2, "public_size": 2}
    columns = {"input_column": ["a", "b"], "mean": [0.5, 1.0], "std": [1.0, 2.0]}
    config = compose("hf", path=str(tmp_path / "data.csv"), **declared, **columns)
    assert instantiate(config.data).train[0].tolist() == [[0, 0], [1, 0.5]]
