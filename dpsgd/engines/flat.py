"""Tensors that lie one after another in memory: one pass over it reaches all of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor


class Flat:
    """Memory for tensors of given shapes, one block for each dtype; its content is arbitrary.

    Args:
        dtypes: Of the tensors, by name.
        blocks: A one-dimensional tensor for each dtype.
    """

    def __init__(
        self, dtypes: Mapping[str, torch.dtype], blocks: Mapping[torch.dtype, Tensor]
    ) -> None:
        self._dtypes = dict(dtypes)
        self._blocks = dict(blocks)
        self._holders = self._count()

    @classmethod
    def like(
        cls,
        shapes: Mapping[str, torch.Size],
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
    ) -> Flat:
        """Returns new memory for tensors of these shapes and dtypes."""
        sizes = _sizes(shapes, dtypes)
        blocks = {d: torch.empty(size, dtype=d, device=device) for d, size in sizes.items()}
        return cls(dtypes, blocks)

    def tensors(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Returns the tensors, in their order."""
        places = dict.fromkeys(self._blocks, 0)
        tensors = {}
        for name, shape in shapes.items():
            dtype, start = self._dtypes[name], places[self._dtypes[name]]
            places[dtype] += shape.numel()
            tensors[name] = self._blocks[dtype][start : places[dtype]].view(shape)
        return tensors

    def blocks(self) -> list[Tensor]:
        """Returns the memory itself, one tensor for each dtype."""
        return list(self._blocks.values())

    def fits(
        self,
        shapes: Mapping[str, torch.Size],
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
    ) -> bool:
        """Whether it could be memory for these, and nobody holds a tensor in it any more."""
        sizes = _sizes(shapes, dtypes)
        return (
            self._dtypes == dict(dtypes)
            and {d: block.numel() for d, block in self._blocks.items()} == sizes
            and all(block.device == device for block in self._blocks.values())
            and self._count() == self._holders
        )

    def _count(self) -> list[tuple[int, int]]:
        """How many tensors and how many Python objects hold each block."""
        storages = [block.untyped_storage() for block in self._blocks.values()]
        return [
            (torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage))
            for storage in storages
        ]


def _sizes(
    shapes: Mapping[str, torch.Size], dtypes: Mapping[str, torch.dtype]
) -> dict[torch.dtype, int]:
    """How many numbers of each dtype there are."""
    sizes = dict.fromkeys(dtypes.values(), 0)
    for name, shape in shapes.items():
        sizes[dtypes[name]] += shape.numel()
    return sizes
