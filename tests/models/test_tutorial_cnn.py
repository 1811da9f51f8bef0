"""The network of the tutorials, to the last parameter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dpsgd import losses
from dpsgd.engines import Ghost, Hooks, Vmap
from dpsgd.models import TutorialCNN
from dpsgd.testing import assert_engines_agree


def test_its_parameters_on_mnist():
    model = TutorialCNN([1, 28, 28], 10)
    assert sum(p.numel() for p in model.parameters()) == 26010


def test_its_forward_pass_layer_by_layer():
    model, x = TutorialCNN([1, 28, 28], 10), torch.randn(3, 1, 28, 28)
    first, second = (layer for layer in model.features if isinstance(layer, torch.nn.Conv2d))
    padded = F.pad(x, (3, 3, 3, 3))
    hidden = F.conv2d(padded, first.weight, first.bias, stride=2).relu()
    assert hidden.shape == (3, 16, 14, 14)
    hidden = F.conv2d(F.max_pool2d(hidden, 2, 1), second.weight, second.bias, stride=2).relu()
    hidden = F.max_pool2d(hidden, 2, 1)
    assert hidden.shape == (3, 32, 4, 4)
    torch.testing.assert_close(model(x), model.head(model.hidden(hidden.flatten(1))))


@pytest.mark.parametrize("shape", [[1, 14, 15], [3, 32, 20], [28, 28]])
def test_other_images(shape):
    model = TutorialCNN(shape, 4, activation="tanh")
    assert model(torch.randn(2, *shape)).shape == (2, 4)


def test_an_image_that_is_too_small():
    with pytest.raises(ValueError, match="at least 14 x 14 pixels, got"):
        TutorialCNN([1, 13, 28], 10)


def test_engines_agree():
    model = TutorialCNN([1, 16, 16], 3).double()
    batch = torch.randn(3, 1, 16, 16).double(), torch.tensor([0, 2, 1])
    assert_engines_agree(model, losses.cross_entropy, batch, [Ghost, Hooks, Vmap], rtol=1e-10)
