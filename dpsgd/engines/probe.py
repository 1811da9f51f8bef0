"""A check for engines that read the sample axis off the first dimension of a layer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpsgd.engines.base import Engine
from dpsgd.engines.batch import Batch, Signature, check_losses, map_tensors, signature_of
from dpsgd.engines.grads import PerSampleGrads
from dpsgd.engines.narrowest import Narrowest

try:
    import numpy
except ImportError:  # torch runs without it
    numpy = None  # type: ignore[assignment]


class RandomState:
    """The state of the global generators, to draw again from.

    PyTorch's (CPU and the model's CUDA devices), Python's, and NumPy's if it is in use.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._devices = sorted(
            {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
        )
        self._cpu = torch.random.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]
        self._python = random.getstate()
        self._numpy = numpy.random.get_state() if numpy is not None else None

    def restore(self) -> None:
        """Goes back to this state."""
        torch.random.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            numpy.random.set_state(self._numpy)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Goes back to this state for a while, and then to the present one."""
        present = RandomState(self._model)
        try:
            self.restore()
            yield
        finally:
            present.restore()


def check_combination(
    engine: Engine,
    gradients: Callable[[Batch, int, Mapping[str, nn.Parameter]], PerSampleGrads],
    batch: Batch,
    size: int,
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Raises unless sum_i r_i g_i is autograd's gradient of sum_i r_i l_i, for random r_i.

    A plain sum would not notice gradients given to the wrong sample. Norms are held against the
    materialised gradients as well.

    Raises:
        ValueError: Naming the parameter.
    """
    state = RandomState(engine.model)
    grads = gradients(batch, size, parameters)
    squares, dense = grads._squared_norms(), grads.materialize()
    state.restore()
    with Narrowest() as seen:
        losses = check_losses(engine.loss_fn(engine.model, batch), size)
    weights = torch.linspace(0.5, 1.5, size, dtype=torch.float64)[torch.randperm(size)]
    weights = weights.to(device=losses.device, dtype=losses.dtype)
    expected = plain_gradients((losses * weights).sum(), parameters)
    everything = torch.stack([g.double().norm() for g in expected.values()]).norm()
    for name, reference in expected.items():
        total = torch.tensordot(weights.to(dense[name].dtype), dense[name], 1)
        own = dense[name].flatten(1).double().norm(dim=1)
        norm = squares[name].sqrt().to(reference.dtype)
        known = torch.isfinite(norm)  # what is not gets weight 0
        total = total.to(reference.dtype)
        slack = everything * 0.01
        rounding = 0.1 if seen.coarse else 1e-3
        if not (
            _close(total, reference, slack, rounding)
            and _close(norm[known], own[known], slack, rounding)
        ):
            raise ValueError(
                f"{engine!r} gives wrong per-sample gradients for '{name}': they do not agree with "
                "autograd's (a weight used outside its own module, samples in another order?). Use "
                "engine=vmap or engine=loop."
            )


def plain_gradients(
    objective: Tensor, parameters: Mapping[str, nn.Parameter], retain_graph: bool = False
) -> dict[str, Tensor]:
    """Returns autograd's gradients of a scalar by name, zero where it does not depend on one."""
    if not objective.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    grads = torch.autograd.grad(
        objective,
        list(parameters.values()),
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    dense = (grad.to_dense() if grad.is_sparse else grad for grad in grads)
    return dict(zip(parameters, dense, strict=True))


def _close(actual: Tensor, reference: Tensor, slack: Tensor, tolerance: float) -> bool:
    """Whether two tensors agree but for rounding; an infinite or NaN reference tells nothing."""
    if not torch.isfinite(reference).all():
        return True
    gap = (actual.double() - reference.double()).norm()
    return bool(gap <= tolerance * (reference.double().norm() + slack.nan_to_num()))


class SizeProbe:
    """Runs a model once per signature of its samples, on a few rows: at *another* batch size.

    A dimension belongs to the samples if and only if it changes with the batch size. Without the
    probe, a layer fed with [T] position ids or time-major data [T, B, ...] would be mistaken for a
    batch whenever T = B. The trainer's preflight brings the signature along with synthetic records,
    so that no private record is ever probed.

    It runs twice, the second time with moved weights: a layer that starts at zero, or nearly so,
    would hide what is wrong before it until the first step.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[tuple[bool, ...], frozenset[str], Signature]] = set()

    def __call__(
        self, model: nn.Module, batch: Batch, size: int, run: Callable[[Batch, int], object]
    ) -> None:
        """Calls `run(other_batch, other_size)`, which raises if some layer sees another size.

        Random states, buffers and weights are restored afterwards.
        """
        modes = tuple(module.training for module in model.modules())
        trainable = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        signature = (modes, trainable, signature_of(batch))
        if signature in self._seen:
            return
        other = 5 if size == 4 else 4
        rows = torch.arange(other) % size
        few = map_tensors(lambda t: t[rows.to(t.device)], batch)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        with RandomState(model).replayed(), torch.enable_grad():
            try:
                run(few, other)
                with _moved_weights(model):
                    run(few, other)
            except ValueError:
                raise
            except Exception as error:
                raise ValueError(
                    f"The model runs on {size} samples but not on {other}: {error} "
                    "Expected a model without a fixed batch size."
                ) from error
            finally:
                for buffer, kept in buffers:
                    buffer.copy_(kept)
        if _tells_rows_apart(few, min(size, other)):
            self._seen.add(signature)


@contextmanager
def _moved_weights(model: nn.Module) -> Iterator[None]:
    """Gives trainable parameters other values of the same sign, and small ones to zeros."""
    kept = [(p, p.data) for p in model.parameters() if p.requires_grad]
    try:
        for p, own in kept:
            scale = 0.3 * (own.shape[0] / max(1, own.numel())) ** 0.5 if own.dim() else 0.3
            small = own.abs() < 0.03 * scale
            moved = own * (1 + 0.3 * (2 * torch.rand_like(own) - 1))
            p.data = torch.where(small, scale * torch.randn_like(own), moved)
        yield
    finally:
        for p, own in kept:
            p.data = own


def _tells_rows_apart(batch: Batch, size: int) -> bool:
    """Whether a batch has that many different, finite rows: others hide in which order they are."""
    leaves = [leaf[:, None].flatten(1).double() for leaf in tree_leaves(batch) if leaf.numel()]
    if size < 2 or not leaves or not all(torch.isfinite(leaf).all() for leaf in leaves):
        return False
    return len(torch.cat(leaves, 1).unique(dim=0)) >= size
