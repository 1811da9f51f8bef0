"""Devices and dtypes: `module.to` works in place, `tensor.to` does not."""

import pytest
import torch
from torch import nn

from dpsgd.placement import Placement


def test_a_module_is_moved_in_place_with_its_buffers():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    placed = Placement.from_names("cpu", "float64").model(model)
    assert placed is model
    assert model[0].weight.dtype == model[1].running_mean.dtype == torch.float64
    assert model[1].num_batches_tracked.dtype == torch.int64


def test_a_tensor_is_not_moved_in_place_and_integers_are_left_alone():
    x, y = torch.zeros(2), torch.arange(2)
    x.to(torch.float64)
    assert x.dtype == torch.float32
    placed = Placement.from_names("cpu", "float64").batch({"x": x, "y": (y,)})
    assert placed["x"].dtype == torch.float64
    assert placed["y"][0].dtype == torch.int64
    assert x.dtype == torch.float32


def test_to_double_on_a_module_made_of_nested_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_layer = nn.Sequential(nn.Conv2d(27, 4, 6, 1, padding=2), nn.ReLU())
            self.action_mlp_layer = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32))

    net = Net()
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    net.to(torch.double)
    assert {p.dtype for p in net.parameters()} == {torch.float64}


def test_a_model_tells_its_placement():
    place = Placement.of(nn.Linear(2, 2).bfloat16())
    assert place == Placement(torch.device("cpu"), torch.bfloat16)


def test_auto_finds_a_device():
    assert Placement.from_names("auto", "float32").device.type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(
    ("device", "dtype", "words"),
    [
        ("gpu", "float32", "device cpu, cuda"),
        ("cpu:7", "float32", "1 cpu device"),
        ("cuda:99", "float32", "this machine"),
        ("cpu", "float16", "dtype"),
        ("cpu", "double", "dtype"),
    ],
)
def test_unknown_names_are_refused(device, dtype, words):
    with pytest.raises(ValueError, match=words):
        Placement.from_names(device, dtype)


def test_mask_as_indices():
    data = torch.arange(5)
    data[data <= 2] = 0
    assert data.tolist() == [0, 0, 0, 3, 4]


def test_mask_keeps_gradients_of_what_it_leaves():
    data = torch.arange(15, dtype=torch.float64).view(5, 3).requires_grad_(True)
    (data * (data <= 6)).sum().backward()
    assert data.grad.tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
