"""The declared schema: what records must look like, and that nothing is derived from them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dpsgd.data import Dataset, Schema


def build(**changes):
    arguments = {
        "train": (torch.randn(6, 2, 3), torch.tensor([0, 1, 2, 0, 1, 2])),
        "test": None,
        "input_shape": [2, 3],
        "num_classes": 3,
        "public_size": 100,
    }
    return Dataset(**{**arguments, **changes})


def inputs(x):
    return {"train": (x, torch.zeros(len(x)).long())}


def targets(y, **changes):
    return {"train": (torch.randn(len(y), 2, 3), y), **changes}


def test_length_is_the_number_of_training_records():
    assert len(build()) == 6


def test_public_size_is_declared():
    assert build(public_size=1).public_size == 1
    assert build(public_size=10**6).public_size == 10**6


def test_the_shape_is_a_tuple():
    assert build().input_shape == (2, 3)


def test_declarations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        build().public_size = 7


def test_records_are_not_printed():
    assert "tensor" not in repr(build())


def test_more_classes_may_be_declared_than_occur():
    assert build(num_classes=50).num_classes == 50


def test_take_returns_the_records_in_the_order_asked_for():
    data = build()
    x, y = data.take(torch.tensor([4, 0, 4]))
    assert torch.equal(x, data.train[0][[4, 0, 4]])
    assert y.tolist() == [1, 0, 1]


def test_take_of_nothing():
    x, y = build().take(torch.tensor([], dtype=torch.int64))
    assert (x.shape, y.shape) == ((0, 2, 3), (0,))


def test_take_leaves_the_records_alone():
    data = build()
    data.take(torch.tensor([0]))[0].zero_()
    assert data.train[0][0].abs().sum() > 0


def test_regression():
    assert build(**targets(torch.randn(4), num_classes=None)).num_classes is None


def test_token_ids():
    ids = torch.randint(9, (4, 5))
    data = build(**inputs(ids), input_shape=[5], vocab_size=9)
    assert data.vocab_size == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"public_size": 0}, "public_size"),
        ({"public_size": 2.0}, "public_size"),
        ({"public_size": None}, "public_size"),
        ({"num_classes": 0}, "num_classes"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"input_shape": [2, 0]}, "input_shape"),
        ({"input_shape": [3, 2]}, "Declare the shape"),
        ({"num_classes": 2}, r"training labels within 0\.\.1"),
        ({"num_classes": None}, "floating training targets"),
        ({"vocab_size": 5}, "training token ids as torch.int64"),
        (inputs(torch.full((4, 2, 3), torch.nan)), "finite training inputs"),
        (inputs(torch.full((4, 2, 3), torch.inf)), "finite training inputs"),
        (inputs(torch.zeros(4, 2, 3).long()), "Set vocab_size"),
        (inputs(torch.zeros(0, 2, 3)), "at least one record"),
        ({"train": (torch.zeros(4, 2, 3), torch.zeros(5).long())}, "one target per input"),
        (targets(torch.tensor([0, -100])), r"training labels within 0\.\.2"),
        (targets(torch.tensor([0.0, 1.0])), "labels as torch.int64"),
        (targets(torch.tensor([0.0, torch.nan]), num_classes=None), "finite training targets"),
        ({"test": (torch.zeros(4, 2, 3), torch.full((4,), 3))}, r"test labels within 0\.\.2"),
        ({"test": (torch.zeros(4, 2), torch.zeros(4).long())}, "Expected test inputs"),
    ],
)
def test_what_does_not_match_the_declarations(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize("token", [-1, 9])
def test_token_ids_outside_the_vocabulary(token):
    ids = torch.tensor([[1, 2], [3, token]])
    with pytest.raises(ValueError, match=r"token ids within 0\.\.8"):
        build(**inputs(ids), input_shape=[2], vocab_size=9)


def test_messages_do_not_tell_a_private_value():
    with pytest.raises(ValueError, match="got others") as caught:
        build(**targets(torch.tensor([0, 4711])))
    assert "4711" not in str(caught.value)


def test_conform_reshapes_and_casts():
    x, y = Schema([1, 2, 3], 4).conform(torch.ones(5, 6, dtype=torch.uint8), torch.ones(5).int())
    assert (x.shape, x.dtype, y.dtype) == ((5, 1, 2, 3), torch.float32, torch.int64)


def test_conform_keeps_token_ids_integer():
    x, _ = Schema([6], 4, vocab_size=9).conform(torch.ones(5, 6).int(), torch.ones(5).int())
    assert x.dtype == torch.int64


def test_conform_makes_regression_targets_floating():
    _, y = Schema([6]).conform(torch.ones(5, 6), torch.ones(5).int())
    assert y.dtype == torch.float32


def test_conform_does_not_mix_records():
    with pytest.raises(ValueError, match="6 values each, got"):
        Schema([2, 3], 4).conform(torch.ones(6, 5), torch.ones(6).long())


def test_labels_per_position_may_not_count():
    y = torch.tensor([[0, 1, -100], [-100, -100, 2]])
    assert torch.equal(build(**targets(y)).train[1], y)


@pytest.mark.parametrize("y", [[-100, 1], [[-99, 1], [0, 1]], [[3, 1], [0, 1]]])
def test_other_labels_out_of_range_are_refused(y):
    with pytest.raises(ValueError, match=r"labels within 0\.\.2"):
        build(**targets(torch.tensor(y)))
