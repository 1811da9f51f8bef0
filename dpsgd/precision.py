"""Forward passes in bfloat16 with parameters in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dpsgd.engines import Batch

UPDATES_LOST = (
    "dtype=bfloat16 keeps 8 bits of a number: an update below 1/512 of a parameter is rounded "
    "away. autocast=bfloat16 with dtype=float32 computes in bfloat16 as well, and keeps it."
)
"""What somebody who trains parameters in bfloat16 should know."""


@dataclass(frozen=True)
class Autocast:
    """A loss whose forward pass runs under `torch.autocast` in bfloat16.

    Parameters stay float32, and so do their gradients. What autocast remembers of cast weights is
    off: a weight that is used several times (tied, recurrent) then has its gradients added up in
    float32. Everything after the gradients of single samples (norms, clip factors, sums, noise) is
    outside of it.

    Attributes:
        loss_fn: The loss.
    """

    loss_fn: Callable[[Any, Any], Tensor]

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Returns the losses [B], in float32 for the losses of `dpsgd.losses`."""
        with self.context(batch):
            return self.loss_fn(model, batch)

    def context(self, batch: Batch) -> AbstractContextManager[Any]:
        """Returns autocast for the device that a batch is on."""
        device = next(leaf.device.type for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        return torch.autocast(device, torch.bfloat16, cache_enabled=False)


def autocast_of(loss_fn: object, batch: Batch) -> AbstractContextManager[Any]:
    """Returns what a loss runs its model in, for other forward passes on such a batch."""
    return loss_fn.context(batch) if isinstance(loss_fn, Autocast) else nullcontext()


def with_autocast(
    loss_fn: Callable[[Any, Any], Tensor], autocast: str | None, dtype: torch.dtype
) -> Callable[[Any, Any], Tensor]:
    """Returns a loss as the setting `autocast` asks for it.

    Args:
        loss_fn: The loss.
        autocast: `bfloat16`, or None for none.
        dtype: That of the parameters.

    Raises:
        ValueError: If it is another word, or the parameters are not in float32.
    """
    if autocast is None:
        return loss_fn
    if autocast in ("float16", "fp16", "half"):
        raise ValueError(
            f"Expected autocast=bfloat16 or null, got '{autocast}': its small range would need "
            "losses to be scaled. Use autocast=bfloat16."
        )
    if autocast != "bfloat16":
        raise ValueError(f"Expected autocast=bfloat16 or null, got '{autocast}'.")
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"Expected dtype=float32 with autocast=bfloat16, got dtype={name}. Autocast computes "
            "in bfloat16 with parameters in float32; leave out one of the two."
        )
    return Autocast(loss_fn)
