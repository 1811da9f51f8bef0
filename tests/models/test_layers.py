"""The layers that models are built from: what shapes they map to what, and when they are random."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel_size", [3, 4, (3, 5)])
def test_conv_with_same_padding_keeps_height_and_width(kernel_size):
    layer = nn.Conv2d(26, 32, kernel_size, padding="same")
    assert layer(torch.randn(128, 26, 4, 13)).shape == (128, 32, 4, 13)


def test_flatten_keeps_the_samples_apart():
    assert nn.Flatten()(torch.empty(256, 4, 64, 128)).shape == (256, 32768)


def test_flatten_between_start_and_end():
    assert nn.Flatten(0, 2)(torch.empty(256, 4, 64, 128)).shape == (65536, 128)


def test_linear_on_vectors():
    assert nn.Linear(7, 3)(torch.randn(5, 7)).shape == (5, 3)


def test_linear_on_positions():
    layer, x = nn.Linear(7, 3), torch.randn(5, 6, 7)
    out = layer(x)
    assert out.shape == (5, 6, 3)
    torch.testing.assert_close(out[:, 2], layer(x[:, 2]))


def test_dropout_in_training_drops_and_scales():
    torch.manual_seed(0)
    out = nn.Dropout(0.25).train()(torch.ones(10_000))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert out.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.02)  # 4.6 sigma


def test_dropout_in_evaluation_is_the_identity():
    x = torch.randn(100)
    assert torch.equal(nn.Dropout(0.25).eval()(x), x)
