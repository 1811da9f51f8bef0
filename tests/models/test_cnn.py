"""The convolutional network works out its own shapes."""

from __future__ import annotations

import pytest
import torch

from dpsgd.models import CNN


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 7, 8])
def test_height_and_width_are_kept_at_stride_one(kernel_size):
    model = CNN([26, 4, 13], 5, channels=[8, 6], kernel_size=kernel_size)
    assert model.features(torch.randn(128, 26, 4, 13)).shape == (128, 6, 4, 13)


@pytest.mark.parametrize("kernel_size", [2, 3, 8])
@pytest.mark.parametrize("stride", [2, 3])
def test_height_and_width_are_divided_by_the_stride(kernel_size, stride):
    model = CNN([2, 7, 9], 5, channels=[3], kernel_size=kernel_size, stride=stride)
    expected = (2, 3, -(-7 // stride), -(-9 // stride))
    assert model.features(torch.randn(2, 2, 7, 9)).shape == expected


@pytest.mark.parametrize("pool", [1, 2])
def test_any_image_shape(pool):
    model = CNN([26, 4, 13], 5, channels=[8, 6], pool=pool)
    assert model(torch.randn(128, 26, 4, 13)).shape == (128, 5)


def test_an_image_without_channels_has_one():
    model = CNN([8, 6], 5)
    x = torch.randn(3, 8, 6)
    torch.testing.assert_close(model(x), model(x.unsqueeze(1)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_even_kernels_pad_like_same():
    model = CNN([1, 6, 5], 3, channels=[2], kernel_size=4)
    pad, conv, _ = model.features
    x = torch.randn(2, 1, 6, 5)
    same = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding="same")
    torch.testing.assert_close(conv(pad(x)), same)


def test_kernels_and_strides_per_layer():
    model = CNN([1, 28, 28], 10, channels=[16, 32], kernel_size=[8, 4], stride=[2, 2])
    assert model.features(torch.randn(2, 1, 28, 28)).shape == (2, 32, 7, 7)


def test_one_kernel_size_per_layer():
    with pytest.raises(ValueError, match="kernel_size to be one integer or 2, one per layer"):
        CNN([1, 8, 8], 10, channels=[4, 4], kernel_size=[3, 3, 3])


def test_pooling_must_leave_an_image():
    with pytest.raises(ValueError, match="Lower pool"):
        CNN([1, 4, 4], 10, channels=[4, 4, 4], pool=2)


def test_vectors_are_no_images():
    with pytest.raises(ValueError, match=r"\[C, H, W\] or \[H, W\], got \[64\]"):
        CNN([64], 10)
