"""Do samples keep apart? Found by perturbing one and watching the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd.checks.comparison import relative_gap, tolerance
from dpsgd.checks.state import restored
from dpsgd.engines import Batch, LossFn
from dpsgd.engines.batch import check_losses, map_tensors, size_of


def check_independence(model: nn.Module, loss_fn: LossFn, batch: Batch) -> None:
    """Raises if changing one sample of the batch moves the loss of another.

    Batch normalisation in train mode does that, a loss averaged over the batch, a reshape that
    mixes time-major data.

    Args:
        model: The model, in the mode that it is trained in.
        loss_fn: `loss_fn(model, batch) -> Tensor[B]`.
        batch: A batch of at least two samples.

    Raises:
        ValueError: If samples are not independent; it names the first module where they meet.
    """
    size = size_of(batch)
    if size < 2:
        raise ValueError(f"Expected a batch of at least 2 samples, got {size}.")
    losses, outputs = _run(model, loss_fn, batch, size)
    again, _ = _run(model, loss_fn, batch, size)
    if relative_gap(again, losses) > tolerance(losses.dtype) / 10:
        raise ValueError(
            "Expected random numbers from the global generators of PyTorch, Python or NumPy, which "
            "can be replayed, but two passes over one batch give different losses. Draw them from "
            "there, or switch the randomness off for the check."
        )
    for changed, row, factor in _changes(batch, size):
        try:
            other_losses, other_outputs = _run(model, loss_fn, changed, size)
        except Exception:
            if factor == 1:
                raise
            continue  # a model may refuse values out of its range; other rows still tell
        if not _moved(losses, other_losses, row):
            continue
        met = _first_meeting(outputs, other_outputs, row)
        raise ValueError(
            "Expected independent samples, but changing one sample of the batch moves the losses "
            f"of others. They first meet {met}. Differential privacy needs one loss per sample "
            "that depends on nothing else: use GroupNorm or LayerNorm instead of BatchNorm "
            "(dpsgd.checks.replace_batch_norm does that), "
            "transpose (never reshape) time-major data, and average within samples only."
        )


@contextmanager
def _outputs(model: nn.Module, size: int) -> Iterator[list[tuple[str, str, Tensor]]]:
    """Collects (path, type, output) of each call of a module that returns [B, ...]."""
    seen: list[tuple[str, str, Tensor]] = []

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.shape[:1] == (size,):
                seen.append((path, type(module).__name__, output.detach().clone()))

        return hook

    handles = [m.register_forward_hook(record(path)) for path, m in model.named_modules() if path]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _run(
    model: nn.Module, loss_fn: LossFn, batch: Batch, size: int
) -> tuple[Tensor, list[tuple[str, str, Tensor]]]:
    with restored(model), torch.no_grad(), _outputs(model, size) as outputs:
        torch.manual_seed(0)
        losses = check_losses(loss_fn(model, map_tensors(Tensor.clone, batch)), size)
    return losses, outputs


def _changes(batch: Batch, size: int) -> Iterator[tuple[Batch, int, int]]:
    """The batch with one row changed, each row in turn: to another row, to a huge one, to zeros."""
    for row in range(size):
        for factor in (1, 100, 0):
            yield map_tensors(partial(_with_row, row=row, factor=factor), batch), row, factor


def _with_row(tensor: Tensor, row: int, factor: int) -> Tensor:
    changed = tensor.clone()
    changed[row] = tensor[row - 1]
    if factor == 0 or tensor.is_floating_point():
        changed[row] = changed[row] * factor  # booleans have no in-place product
    return changed


def _first_meeting(
    outputs: list[tuple[str, str, Tensor]], others: list[tuple[str, str, Tensor]], row: int
) -> str:
    for (path, kind, now), (_, _, other) in zip(outputs, others):
        if now.shape == other.shape and _moved(now, other, row):
            return f"in '{path}' ({kind})"
    return "outside the modules' outputs, in the forward pass or the loss function"


def _moved(now: Tensor, other: Tensor, row: int) -> bool:
    """Whether a row other than the changed one differs."""
    others = torch.arange(len(now), device=now.device) != row
    return relative_gap(other[others], now[others]) > tolerance(now.dtype) / 10
