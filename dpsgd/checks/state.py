"""Does the model run, and does a forward pass leave it as it is?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dpsgd.engines import Batch, LossFn
from dpsgd.engines.batch import check_losses, signature_of, size_of
from dpsgd.engines.probe import RandomState


def check_runs(model: nn.Module, loss_fn: LossFn, batch: Batch) -> None:
    """Raises unless the model and the loss run on the batch and give one loss per sample.

    Raises:
        ValueError: With the words of whatever the model or the loss raised.
    """
    size = size_of(batch)
    with restored(model), torch.no_grad():
        try:
            losses = loss_fn(model, batch)
        except ValueError:
            raise
        except Exception as error:
            shapes = [[size, *shape] for shape, _ in signature_of(batch)]
            raise ValueError(
                f"Expected model and loss to run on a batch of shapes {shapes}, got "
                f"{type(error).__name__}: {error}"
            ) from error
    check_losses(losses, size)


def check_unchanged_state(model: nn.Module, loss_fn: LossFn, batch: Batch) -> None:
    """Raises if a forward pass moves buffers or parameters, which no noise would protect.

    Raises:
        ValueError: Naming what moved: running statistics, or an embedding with max_norm.
    """
    with restored(model) as before, torch.no_grad():
        loss_fn(model, batch)
        now = dict((*model.named_buffers(), *model.named_parameters()))
        moved = [n for n, (_, kept) in before.items() if n not in now or not _same(now[n], kept)]
    if moved:
        raise ValueError(
            f"Expected a forward pass to leave the model as it is, but it moves {moved}. Such "
            "state would learn from the records without noise: use GroupNorm instead of BatchNorm "
            "(dpsgd.checks.replace_batch_norm does that), "
            "track_running_stats=False, or an embedding without max_norm."
        )


@contextmanager
def restored(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Puts buffers, parameters and random states back afterwards; gives (now, before) by name."""
    state = {
        name: (tensor, tensor.detach().clone())
        for name, tensor in (*model.named_buffers(), *model.named_parameters())
    }
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    with RandomState(model).replayed():
        try:
            yield state
        finally:
            for (
                module,
                kept_buffers,
            ) in buffers:  # a forward pass may have put others in their place
                module._buffers.update(kept_buffers)
            with torch.no_grad():
                for now, kept in state.values():
                    now.copy_(kept)


def _same(now: Tensor, kept: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(now.detach()), torch.nan_to_num(kept))
