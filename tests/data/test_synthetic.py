"""Made-up data: any size, the same for the same seed, and learnable."""

from __future__ import annotations

import pytest
import torch

from dpsgd.data import synthetic

KINDS = {
    "images": {"input_shape": [2, 7, 5]},
    "vectors": {"input_shape": [30]},
    "tokens": {"input_shape": [30], "vocab_size": 12},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, **changes):
    arguments = {"num_classes": 3, "public_size": 50, "num_train": 400, "num_test": 200}
    return synthetic(kind, **{**arguments, **KINDS[kind], **changes})


def features(x, data):
    """Numbers to classify by: token counts, or the values themselves."""
    if data.vocab_size is None:
        return x.flatten(1)
    return torch.nn.functional.one_hot(x, data.vocab_size).sum(1).float()


def accuracy(data):
    """Of the nearest class mean."""
    (x, y), (x_test, y_test) = data.train, data.test
    means = torch.stack([features(x[y == label], data).mean(0) for label in range(3)])
    nearest = torch.cdist(features(x_test, data), means).argmin(1)
    return (nearest == y_test).float().mean().item()


@every_kind
def test_sizes(kind):
    data = build(kind)
    assert data.train[0].shape == (400, *KINDS[kind]["input_shape"])
    assert data.test[0].shape == (200, *KINDS[kind]["input_shape"])
    assert data.public_size == 50


@every_kind
def test_the_signal_can_be_learned(kind):
    assert accuracy(build(kind)) > 0.8


@every_kind
def test_no_signal_leaves_nothing_to_learn(kind):
    assert accuracy(build(kind, signal=0.0)) < 0.5  # chance is 1/3, its deviation 0.034


@every_kind
def test_the_seed_decides(kind):
    first, again, other = build(kind), build(kind), build(kind, seed=1)
    assert torch.equal(first.train[0], again.train[0])
    assert not torch.equal(first.train[0], other.train[0])


@every_kind
def test_the_global_random_state_is_left_alone(kind):
    before = torch.random.get_rng_state()
    build(kind)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_test_records_mean_no_test_set():
    assert build("vectors", num_test=0).test is None


def test_images_without_channels():
    assert build("images", input_shape=[7, 5]).train[0].shape == (400, 7, 5)


def test_a_class_may_have_no_record():
    assert len(build("tokens", num_classes=50, num_train=1, num_test=0)) == 1


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("tokens", {"vocab_size": None}, "vocab_size"),
        ("tokens", {"input_shape": [3, 4]}, r"input_shape \[T\]"),
        ("vectors", {"vocab_size": 7}, "vocab_size"),
        ("images", {"input_shape": [30]}, r"\[C, H, W\] or \[H, W\]"),
        ("vectors", {"num_train": 0}, "num_train >= 1"),
        ("vectors", {"num_test": -1}, "num_test >= 0"),
        ("vectors", {"num_classes": None}, "num_classes"),
        ("vectors", {"signal": -1.0}, "signal >= 0"),
    ],
)
def test_arguments_are_checked(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **changes)


def test_an_unknown_kind_lists_the_choices():
    with pytest.raises(ValueError, match="vectors, images, tokens, got sounds"):
        synthetic("sounds", [3], 2, 10, 10)
