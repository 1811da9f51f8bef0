"""Softmax regression and the perceptron, which generalises it."""

from __future__ import annotations

import pytest
import torch

from dpsgd.models import MLP, Linear


def test_linear_is_affine_in_the_flattened_input():
    model, x = Linear([2, 3], 4), torch.randn(5, 2, 3)
    expected = x.reshape(5, 6) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected)


def test_mlp_without_hidden_layers_is_linear():
    assert sum(p.numel() for p in MLP([6], 4, widths=[]).parameters()) == 6 * 4 + 4


def test_mlp_widths():
    weights = [p.shape for p in MLP([6], 4, widths=[5, 3]).parameters() if p.dim() == 2]
    assert weights == [(5, 6), (3, 5), (4, 3)]


def test_mlp_widths_are_positive():
    with pytest.raises(ValueError, match=r"widths\[1\]"):
        MLP([6], 4, widths=[5, 0])
