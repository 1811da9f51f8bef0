"""Checks of model, loss and engine that run before any privacy is spent, on synthetic batches.

They never see a private record: a refusal that depended on one would leak it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpsgd.data import Dataset
from dpsgd.engines import Batch, Engine, Loop, LossFn
from dpsgd.engines.batch import check_losses, map_tensors, signature_of, size_of
from dpsgd.engines.probe import RandomState

_DROPOUTS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
)


def synthetic_batch(data: Dataset, size: int) -> Batch:
    """Returns a random batch (x, y) of what is declared about the data, none of its records."""
    shape = (size, *data.input_shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.rand(shape)
        if data.vocab_size is not None:
            x = torch.randint(data.vocab_size, shape)
        for row, start in enumerate(torch.randperm(size) * shape[1] // size):
            x[row, start + 1 :] = 0  # as if padded, to several lengths in no order
        targets = data.train[1]
        y = torch.rand((size, *targets.shape[1:]))
        if data.num_classes is not None:
            y = torch.randint(data.num_classes, y.shape, dtype=targets.dtype)
    return x, y


def preflight(engine: Engine, batch: Batch) -> None:
    """Raises unless the engine treats a synthetic batch exactly and the samples keep apart.

    Args:
        engine: The engine, with its model in the mode that it is used in.
        batch: A synthetic batch of at least two samples, of the shapes that training will see.

    Raises:
        ValueError: If samples influence each other's losses, a forward pass changes buffers or
            parameters, or the engine's gradients differ from those of `Loop`.
    """
    check_runs(engine.model, engine.loss_fn, batch)
    check_unchanged_state(engine.model, engine.loss_fn, batch)
    check_independence(engine.model, engine.loss_fn, batch)
    check_agreement(engine, batch)


def check_runs(model: nn.Module, loss_fn: LossFn, batch: Batch) -> None:
    """Raises unless the model and the loss run on the batch and give one loss per sample.

    Raises:
        ValueError: With the words of whatever the model or the loss raised.
    """
    size = size_of(batch)
    with _restored(model), torch.no_grad():
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
            "that depends on nothing else: use GroupNorm or LayerNorm instead of BatchNorm, "
            "transpose (never reshape) time-major data, and average within samples only."
        )


def check_unchanged_state(model: nn.Module, loss_fn: LossFn, batch: Batch) -> None:
    """Raises if a forward pass moves buffers or parameters, which no noise would protect.

    Raises:
        ValueError: Naming what moved: running statistics, or an embedding with max_norm.
    """
    with _restored(model) as before, torch.no_grad():
        loss_fn(model, batch)
        now = dict((*model.named_buffers(), *model.named_parameters()))
        moved = [n for n, (_, kept) in before.items() if n not in now or not _same(now[n], kept)]
    if moved:
        raise ValueError(
            f"Expected a forward pass to leave the model as it is, but it moves {moved}. Such "
            "state would learn from the records without noise: use GroupNorm instead of BatchNorm, "
            "track_running_stats=False, or an embedding without max_norm."
        )


def check_agreement(engine: Engine, batch: Batch) -> None:
    """Raises if the engine's per-sample gradients differ from those of `Loop`, dropout being off.

    A model that draws other random numbers cannot be compared and passes.

    Raises:
        ValueError: Naming the parameter with the largest difference.
    """
    if isinstance(engine, Loop):
        return
    loop = Loop(engine.model, engine.loss_fn)
    with _restored(engine.model), without_dropout(engine.model):
        expected = loop(batch).materialize()
        again = loop(batch).materialize()
        actual = engine(batch).materialize()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    gaps = {name: relative_gap(actual[name], expected[name], scale) for name in expected}
    noise = max(relative_gap(again[name], expected[name]) for name in expected)
    worst = max(gaps, key=lambda name: gaps[name])
    if gaps[worst] > tolerance(expected[worst].dtype) and noise == 0:
        raise ValueError(
            f"Expected {type(engine).__name__} to agree with Loop, but the per-sample gradients of "
            f"'{worst}' differ by {gaps[worst]:.1e} of their size. Use engine=loop, and please "
            "report the model."
        )


def relative_gap(actual: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Returns max |actual - expected| / max |expected|, infinite where only one is finite.

    The divisor is at least a hundredth of `scale`: a gradient that is zero but for rounding, beside
    others that are not, has no relative accuracy.
    """
    actual, expected = actual.double().cpu(), expected.double().cpu()
    if not torch.equal(torch.isfinite(actual), torch.isfinite(expected)):
        return float("inf")
    finite = torch.isfinite(expected)
    if not finite.any():
        return 0.0
    gap = (actual - expected)[finite].abs().max()
    least = max(1e-12, scale / 100 if scale < float("inf") else 0.0)
    return float(gap / expected[finite].abs().max().clamp(min=least)) if gap > 1e-12 else 0.0


def tolerance(dtype: torch.dtype) -> float:
    """Returns the relative difference that rounding explains: 1e-9, 1e-3, or 0.1 for bfloat16."""
    return {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 0.1)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switches dropout off for a while, leaving the model in its mode."""
    recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase) and m.dropout]
    kept = [module.dropout for module in recurrent]
    for module in recurrent:
        module.dropout = 0.0
    try:
        with _NoDropout():
            yield
    finally:
        for module, probability in zip(recurrent, kept):
            module.dropout = probability


class _NoDropout(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if kwargs.get("dropout_p"):
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


@contextmanager
def _restored(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
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
    with _restored(model), torch.no_grad(), _outputs(model, size) as outputs:
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
        changed[row] *= factor
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


def _same(now: Tensor, kept: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(now.detach()), torch.nan_to_num(kept))
