"""The bundled digits: a fixed split of small images in [0, 1]."""

from __future__ import annotations

import pytest
import torch

from dpsgd.data import digits


def test_sizes_of_the_split():
    data = digits()
    assert [len(part) for part in (*data.train, *data.test)] == [1437, 1437, 360, 360]


def test_images():
    x, y = digits().train
    assert (x.shape[1:], x.dtype, y.dtype) == ((1, 8, 8), torch.float32, torch.int64)
    assert (x.min(), x.max()) == (0, 1)


def test_every_class_has_its_share_of_the_test_set():
    assert digits().test[1].bincount().tolist() == pytest.approx([36] * 10, abs=1.01)


def test_the_split_is_always_the_same():
    torch.manual_seed(1)
    first = digits()
    torch.manual_seed(2)
    assert torch.equal(first.train[0], digits().train[0])


@pytest.mark.parametrize("shape", [[64], [8, 8]])
def test_other_shapes_of_64_values(shape):
    assert digits(input_shape=shape).train[0].shape == (1437, *shape)


def test_a_shape_that_does_not_fit():
    with pytest.raises(ValueError, match="65 values each"):
        digits(input_shape=[65])


def test_too_few_classes():
    with pytest.raises(ValueError, match=r"within 0\.\.8"):
        digits(num_classes=9)
