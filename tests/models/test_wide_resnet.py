"""Wide residual networks: the published sizes and the arguments' limits."""

from __future__ import annotations

import pytest
import torch

from dpsgd.models import WideResNet


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(40, 4, 8.9), (16, 8, 11.0), (28, 10, 36.5)]
)
def test_number_of_parameters_in_the_paper(depth, width, millions):
    with torch.device("meta"):
        model = WideResNet([3, 32, 32], 10, depth=depth, width=width)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_depth_sixteen_has_two_blocks_per_stage():
    model = WideResNet([3, 8, 8], 10, depth=16, width=1, groups=4)
    assert len(model.blocks) == 6


@pytest.mark.parametrize("shape", [(3, 9, 5), (7, 11)])
def test_any_image_shape(shape):
    model = WideResNet(shape, 10, depth=10, width=1, groups=4)
    assert model(torch.randn(2, *shape)).shape == (2, 10)


def test_normalisation_is_within_samples():
    kinds = {type(m).__name__ for m in WideResNet([3, 8, 8], 10).modules()}
    assert "GroupNorm" in kinds
    assert not any("BatchNorm" in kind for kind in kinds)


@pytest.mark.parametrize("depth", [4, 12, 1])
def test_depth_is_six_n_plus_four(depth):
    with pytest.raises(ValueError, match="10, 16, 22"):
        WideResNet([3, 8, 8], 10, depth=depth)


def test_groups_divide_the_channels():
    with pytest.raises(ValueError, match="groups to divide 16, got 5"):
        WideResNet([3, 8, 8], 10, groups=5)
