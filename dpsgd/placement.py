"""Device and dtype: where the model is, batches go."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpsgd.engines import Batch
from dpsgd.engines.batch import map_tensors

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """A device and a floating dtype for model and batches alike.

    Attributes:
        device: Where tensors go.
        dtype: What floating tensors become; integer ones (labels, token ids) stay as they are.
    """

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def from_names(cls, device: str, dtype: str) -> Placement:
        """Returns the placement for words such as `auto`, `cuda:1` and `bfloat16`.

        Raises:
            ValueError: If there is no such device or dtype, on this machine or at all.
        """
        if dtype not in _DTYPES:
            raise ValueError(f"Expected dtype to be one of {', '.join(_DTYPES)}, got '{dtype}'.")
        placement = cls(_device(str(device)), _DTYPES[dtype])
        if placement.device.type == "mps" and placement.dtype == torch.float64:
            raise ValueError("Expected dtype=float32 or bfloat16 on mps, which has no float64.")
        return placement

    @classmethod
    def of(cls, model: nn.Module) -> Placement:
        """Returns where a model's parameters are."""
        first = next(model.parameters())
        return cls(first.device, first.dtype)

    def model(self, model: nn.Module) -> nn.Module:
        """Moves a model, parameters and buffers, in place; returns it."""
        return model.to(device=self.device, dtype=self.dtype)

    def batch(self, batch: Batch) -> Batch:
        """Returns the batch on the device, floating tensors in the dtype, integers untouched."""
        return map_tensors(self._tensor, batch)

    def _tensor(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=self.device, dtype=dtype)


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"Expected device cpu, cuda, cuda:INDEX, mps or auto, got '{name}'.")
    kind, index = match[1], int(match[2] or 0)
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }[kind]
    if index >= available:
        found = f"{available} {kind} device(s)" if available else f"no {kind} device"
        raise ValueError(f"Expected a device of this machine, got '{name}': it has {found}.")
    return torch.device(name)
