"""Activation checkpointing: what a block computed inside is recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpsgd.engines import Batch
from dpsgd.models.blocks import blocks_of

_FORWARD = "forward"


@dataclass(frozen=True)
class Recomputed:
    """A loss in which each repeated block of the model is checkpointed.

    Chen et al. (2016), arXiv:1604.06174: of a block only the inputs are kept for the backward pass,
    which runs it again, on the same random numbers. The model is as it was when a call returns:
    blocks have another `forward` only while the loss runs.

    Attributes:
        loss_fn: The loss.
    """

    loss_fn: Callable[[Any, Any], Tensor]

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the losses [B]."""
        with _checkpointed(blocks_of(model)):
            return self.loss_fn(model, batch)


@contextmanager
def _checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Gives modules a `forward` that is checkpointed, and takes it off again."""
    own = [(block, vars(block).get(_FORWARD)) for block in blocks]
    try:
        for block in blocks:
            vars(block)[_FORWARD] = partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block, before in own:
            vars(block).pop(_FORWARD, None)
            if before is not None:
                vars(block)[_FORWARD] = before
