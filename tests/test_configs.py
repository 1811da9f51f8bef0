"""Every config composes and builds; the words on the command line are those of the design."""

from itertools import chain

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dpsgd import engines
from dpsgd.components import build
from dpsgd.config import config_dir, resolve, saved_settings

PUBLISHED = {  # want files; test_published.py runs them
    "mnist_opacus", "mnist_tf_privacy", "cifar10_wrn16_4", "cifar10_wrn40_4",
    "sst2_full", "sst2_lora",
}  # fmt: skip
GROUPS = sorted(path.name for path in config_dir().iterdir() if path.is_dir())
CHOICES = [
    (group, path.stem)
    for group in GROUPS
    if group != "plan"  # of dpsgd.account
    for path in sorted((config_dir() / group).glob("*.yaml"))
    if (group, path.stem)
    not in {("data", name) for name in ("tensors", "hf", "text", "labelled_text")}  # want a file
    and path.stem not in PUBLISHED
]

LANGUAGE_MODEL = ["model=hf", "model.type=gpt2", "model.config={n_layer: 1}"]

NEEDED = {  # settings that have no default
    ("clipping", "grouped"): ["clipping.patterns={all: '*'}"],
    ("sampler", "user_poisson"): ["sampler.public_size=100"],
    ("data", "stories"): LANGUAGE_MODEL,
    ("model", "tutorial_cnn"): ["data=synthetic"],
    ("model", "hf"): ["data=stories", *LANGUAGE_MODEL[1:]],
}

WORDS = [
    "device",
    "dtype",
    "seed",
    "run.dir",
    "trainer.num_steps",
    "trainer.epochs",
    "trainer.physical_batch_size",
    "sampler.sample_rate",
    "sampler.expected_batch_size",
    "data.public_size",
    "privacy.target_epsilon",
    "privacy.target_delta",
    "privacy.noise_multiplier",
    "privacy.adjacency",
    "privacy.key",
    "clipping.max_grad_norm",
    "optimizer._target_",
    "optimizer.lr",
    "model.init_from",
]


def composed(*overrides, name="train"):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return resolve(compose(name, overrides=list(overrides)), overrides)


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids="=".join)
def test_every_choice_composes_and_builds(group, choice):
    config = composed(f"{group}={choice}", *NEEDED.get((group, choice), ()))
    if group == "parallel" and choice != "single":
        with pytest.raises(ValueError, match="torchrun --nproc-per-node=N"):
            build(config)
        return
    parts = build(config)
    assert set(parts) >= {"model", "data", "engine", "loss", "clipping", "noise", "sampler"}


def test_a_compute_plan_leaves_steps_and_batch_size_open():
    config = composed("plan=compute", "experiment=digits_epsilon_3", name="account")
    assert config.plan.kind == "compute"
    assert config.trainer.num_steps is config.trainer.epochs is None
    assert config.sampler.sample_rate is config.sampler.expected_batch_size is None
    assert composed(name="account").plan.kind == "none"


@pytest.mark.parametrize("engine", ["loop", "hooks", "vmap", "opacus", "ghost"])
def test_an_engines_word_is_its_modules_and_its_classs_name(engine):
    target = composed(f"engine={engine}").engine._target_
    assert target == f"dpsgd.engines.{engine.capitalize()}"
    module = getattr(engines, engine.capitalize()).__module__
    assert module.removesuffix(".engine") == f"dpsgd.engines.{engine}"


def test_the_fixed_words_exist():
    config = composed()
    for key in WORDS:
        parent, _, last = key.rpartition(".")
        assert last in (OmegaConf.select(config, parent) if parent else config), key


@pytest.mark.parametrize(
    ("typed", "unset"),
    [
        ("privacy.noise_multiplier=2", "privacy.target_epsilon"),
        ("trainer.epochs=2", "trainer.num_steps"),
        ("sampler.expected_batch_size=100", "sampler.sample_rate"),
    ],
)
def test_an_explicit_setting_unsets_the_default_that_it_excludes(typed, unset):
    config = composed(typed)
    assert OmegaConf.select(config, unset) is None
    key, value = typed.split("=")
    assert OmegaConf.select(config, key) == float(value)


def test_a_dictionary_counts_as_its_entries():
    config = composed("privacy={noise_multiplier: 2}")
    assert config.privacy.target_epsilon is None


def test_two_explicit_settings_are_refused():
    with pytest.raises(ValueError, match="exclude each other"):
        composed("trainer.epochs=2", "trainer.num_steps=3")


def test_another_optimizer_drops_the_arguments_of_the_default():
    config = composed("optimizer._target_=torch.optim.Adam", "optimizer.lr=0.1")
    assert dict(config.optimizer) == {
        "_target_": "torch.optim.Adam",
        "_partial_": True,
        "lr": 0.1,
    }


def test_the_saved_config_has_no_key_and_no_interpolation():
    text = saved_settings(composed("privacy.key='" + "12" * 32 + "'"))
    assert "12" * 32 not in text
    assert "<redacted>" in text
    assert "${" not in text


def test_every_config_key_is_documented_or_plain():
    for path in chain.from_iterable((config_dir() / g).glob("*.yaml") for g in GROUPS):
        assert path.read_text().strip(), path
