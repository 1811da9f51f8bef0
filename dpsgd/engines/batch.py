"""Batches: any pytree of tensors whose first dimension counts the samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Batch = Any
"""A pytree (tuple, list, dict, ... of tensors), every tensor shaped [B, ...]."""

Signature = tuple[tuple[tuple[int, ...], torch.dtype], ...]


def size_of(batch: Batch) -> int:
    """Returns B, the number of samples of a batch.

    Raises:
        ValueError: If the batch holds something else than tensors with a first dimension, holds no
            tensor at all, or its tensors disagree in B.
    """
    leaves, _ = pytree.tree_flatten_with_path(batch)
    if not leaves:
        raise ValueError("Expected a batch of tensors [B, ...], got an empty structure.")
    sizes = {}
    for path, leaf in leaves:
        place = f"batch{pytree.keystr(path)}"
        if not isinstance(leaf, Tensor):
            raise ValueError(
                f"Expected a batch of tensors, got {type(leaf).__name__} at {place}. "
                "Make it a tensor [B, ...], or close over it in loss_fn if all samples share it."
            )
        if leaf.dim() == 0:
            raise ValueError(f"Expected tensors with a first dimension B, got a scalar at {place}.")
        sizes[place] = leaf.shape[0]
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{place}: {size}" for place, size in sizes.items())
        raise ValueError(
            f"Expected one batch size in all tensors of the batch, got {listed}. "
            "Samples come first: transpose time-major data in loss_fn."
        )
    return next(iter(sizes.values()))


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Returns the batch with `function` applied to each of its tensors."""
    return pytree.tree_map(function, batch)


def signature_of(batch: Batch) -> Signature:
    """Returns the shape and dtype of one sample's tensors: what is public about a batch."""
    return tuple((tuple(leaf.shape[1:]), leaf.dtype) for leaf in pytree.tree_leaves(batch))


def check_losses(losses: object, size: int) -> Tensor:
    """Returns the losses when they are one floating number per sample, [B].

    Raises:
        ValueError: If they are anything else, a batch mean for example.
    """
    if not isinstance(losses, Tensor):
        raise ValueError(
            f"Expected loss_fn to return a tensor of losses [{size}], got {type(losses).__name__}."
        )
    if losses.shape != (size,):
        raise ValueError(
            f"Expected loss_fn to return one loss per sample, shape [{size}], got "
            f"{list(losses.shape)}. Use reduction='none' and average over each sample's own "
            "positions, never over the batch."
        )
    if not losses.is_floating_point():
        raise ValueError(f"Expected floating losses, got {losses.dtype}.")
    return losses
