"""The Opacus library (Yousefpour et al. 2021, arXiv:2109.12298) as an engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd.engines.base import Engine, LossFn, check_no_gradient_hooks
from dpsgd.engines.batch import Batch, check_losses, map_tensors
from dpsgd.engines.dense import DenseGrads
from dpsgd.engines.grads import PerSampleGrads
from dpsgd.engines.narrowest import Narrowest
from dpsgd.engines.opacus_attachment import Mode, attached, named_errors
from dpsgd.engines.probe import RandomState, SizeProbe, check_combination, plain_gradients

_MODES = ("hooks", "functorch", "ew", "ghost")


class Opacus(Engine):
    """Per-sample gradients by Opacus; nothing of it stays on the model after a call.

    Opacus gets several constructs silently wrong (weights used outside their module, [T] position
    ids when T = B). So once per batch signature the engine holds it against plain autograd, at
    another batch size, and refuses what it gets wrong.

    Args:
        model: The model.
        loss_fn: `loss_fn(model, batch) -> Tensor[B]`.
        mode: `hooks` (a gradient sampler per layer), `functorch` (every layer by vmap), `ew`
            (ExpandedWeights of PyTorch), `ghost` (norms in a first backward, the weighted sum in a
            second one).
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, *, mode: Mode = "hooks") -> None:
        super().__init__(model, loss_fn)
        if mode not in _MODES:
            raise ValueError(f"Expected mode to be one of {', '.join(_MODES)}, got '{mode}'.")
        try:
            import opacus  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "Expected the Opacus library for engine=opacus: pip install opacus."
            ) from error
        self.mode = mode
        self._probe = SizeProbe()

    def _compute(
        self, batch: Batch, size: int, parameters: Mapping[str, nn.Parameter]
    ) -> PerSampleGrads:
        check_no_gradient_hooks(self.model, parameters)
        self._probe(self.model, batch, size, partial(self._check, parameters=parameters))
        return self._gradients(batch, size, parameters)

    def _gradients(
        self, batch: Batch, size: int, parameters: Mapping[str, nn.Parameter]
    ) -> PerSampleGrads:
        if self.mode == "ghost":
            _check_precise({name: p.dtype for name, p in parameters.items()}, "parameters")
            random = RandomState(self.model)
            run = partial(self._ghost, parameters)
            return _GhostGrads(run, batch, size, parameters, random)
        with attached(self.model, self.mode) as view:
            losses = self._losses(view, batch, size)
            with named_errors(self.mode):
                losses.sum().backward()
            rows = {name: vars(p).get("grad_sample") for name, p in parameters.items()}
        return DenseGrads(losses, _checked(rows, parameters, size))

    def _ghost(
        self, parameters: Mapping[str, nn.Parameter], batch: Batch, size: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """First backward: the losses with their graph, and the norms [B] per parameter."""
        with attached(self.model, self.mode) as view:
            losses = self._losses(view, batch, size)
            with named_errors(self.mode):
                losses.sum().backward(retain_graph=True)
            rows = {name: vars(p).get("_norm_sample") for name, p in parameters.items()}
        norms = {}
        for name, row in rows.items():
            norms[name] = losses.detach().new_zeros(size) if row is None else row.reshape(-1)
            if len(norms[name]) > size:
                raise ValueError(
                    f"Opacus (mode=ghost) gives wrong per-sample gradients for '{name}': it takes "
                    "a norm for each row, and a sample has several rows (views, or positions). Use "
                    "mode=hooks or another engine."
                )
            if norms[name].shape != (size,):
                raise _disagreement(name, self.mode)
        return losses, norms

    def _losses(self, view: Any, batch: Batch, size: int) -> Tensor:
        with named_errors(self.mode):
            losses = self.loss_fn(view, batch)
        losses = check_losses(losses, size)
        return losses if losses.requires_grad else losses.detach().requires_grad_()

    def _check(self, batch: Batch, size: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raises unless the per-sample gradients add up to autograd's and have these norms."""
        for path, module in self.model.named_modules():
            flaw = _known_flaw(module, self.mode)
            if flaw is not None:
                raise ValueError(
                    f"Opacus (mode={self.mode}) {flaw} at '{path}': wrong per-sample gradients for "
                    "some batches. Use engine=vmap or engine=loop."
                )
        if self.mode == "ghost":
            with Narrowest() as seen, torch.no_grad():
                self.loss_fn(self.model, batch)
            _check_precise({"the model": seen.dtype}, "a forward pass")
        with _sequences_seen(self.model) as sequences:
            check_combination(self, self._gradients, batch, size, parameters)
        if self.mode == "ghost" and sequences:
            raise ValueError(
                f"Opacus (mode=ghost) computes the norms of {sequences}, linear layers over "
                "sequences, by Gram matrices that cancel in rounding: a norm may come out far too "
                "small. Use mode=hooks or another engine."
            )


class _GhostGrads(PerSampleGrads):
    """Norms from Opacus's ghost hooks; sums by a second backward of the re-weighted losses."""

    def __init__(
        self,
        run: Callable[[Batch, int], tuple[Tensor, dict[str, Tensor]]],
        batch: Batch,
        size: int,
        parameters: Mapping[str, nn.Parameter],
        random: RandomState,
    ) -> None:
        super().__init__(parameters, size)
        self._run, self._batch, self._parameters = run, batch, dict(parameters)
        self._random = random
        self._attached_losses, norms = run(batch, size)
        self._clean_losses: Tensor | None = None
        self._squares = {name: norm.detach().double().square() for name, norm in norms.items()}

    def _losses(self) -> Tensor:
        return self._attached_losses.detach()

    def _squared_norms(self) -> Mapping[str, Tensor]:
        return self._squares

    def _add_weighted_sum(
        self, columns: Mapping[str, Tensor], out: Mapping[str, Tensor], beta: float
    ) -> None:
        losses = self._finite_losses()
        by_column: dict[int, list[str]] = {}
        for name, column in columns.items():
            by_column.setdefault(id(column), []).append(name)
        for names in by_column.values():
            objective = (losses * columns[names[0]].to(losses.dtype)).sum()
            chosen = {name: self._parameters[name] for name in names}
            for name, total in self._differentiate(objective, chosen).items():
                if beta:
                    out[name].add_(total)
                else:
                    out[name].copy_(total)

    def _materialize(self) -> Mapping[str, Tensor]:
        return self._rows(self._attached_losses)

    def _rows(self, losses: Tensor) -> dict[str, Tensor]:
        rows = [self._differentiate(loss, self._parameters) for loss in losses.unbind()]
        return {name: torch.stack([row[name] for row in rows]) for name in self._shapes}

    def _dot(self, direction: Mapping[str, Tensor]) -> Tensor:
        return self._formed().dot(direction)

    def _gram(self, names: Collection[str]) -> Tensor:
        return self._formed().gram(names)

    def _formed(self) -> DenseGrads:
        grads = self._rows(self._finite_losses())
        for grad in grads.values():
            grad[~self._finite] = torch.nan
        return DenseGrads(self._losses(), grads)

    def _differentiate(
        self, objective: Tensor, parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        try:
            return plain_gradients(objective, parameters, retain_graph=True)
        except RuntimeError as error:
            raise ValueError(
                "The parameters changed since these gradients were computed, and Opacus "
                f"(mode=ghost) differentiates again for each sum. Take the sums before the "
                f"step. ({error})"
            ) from error

    def _routes(self) -> dict[str, str]:
        return dict.fromkeys(self._shapes, "Opacus's ghost norms")

    def _release(self) -> None:
        del self._attached_losses, self._run, self._batch
        self._clean_losses, self._squares, self._parameters = None, {}, {}

    @property
    def _finite(self) -> Tensor:
        return torch.stack([torch.isfinite(s) for s in self._squares.values()]).all(0)

    def _finite_losses(self) -> Tensor:
        """The losses of a graph in which nothing is NaN, so that weight 0 gives exact zeros.

        Samples with non-finite gradients are replaced by copies of a finite one and the model runs
        again on the same random numbers; all losses are zero if no sample is finite.
        """
        finite = self._finite
        if finite.all():
            return self._attached_losses
        if self._clean_losses is None:
            source = torch.where(finite, torch.arange(self._size, device=finite.device), 0)
            if finite.any():
                source[~finite] = int(finite.nonzero()[0])
                clean = map_tensors(lambda t: t[source.to(t.device)], self._batch)
                with self._random.replayed(), torch.enable_grad():
                    self._clean_losses, _ = self._run(clean, self._size)
            else:
                self._clean_losses = torch.zeros_like(self._losses(), requires_grad=True)
        return self._clean_losses


def _checked(
    rows: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], size: int
) -> dict[str, Tensor]:
    grads = {}
    for name, p in parameters.items():
        row = rows[name]
        if isinstance(row, Tensor) and len(row) != size and len(row) % size == 0:
            row = row.unflatten(0, (size, -1)).sum(1)  # several rows for each sample
        if row is not None and (not isinstance(row, Tensor) or row.shape != (size, *p.shape)):
            raise ValueError(
                f"Opacus gave no per-sample gradient [{size}, *shape] for '{name}': some layer "
                "does not see the samples in its first dimension. Use engine=vmap or engine=loop."
            )
        grads[name] = p.detach().new_zeros((size, *p.shape)) if row is None else row
    return grads


@contextmanager
def _sequences_seen(model: nn.Module) -> Iterator[list[str]]:
    """Collects the paths of linear layers that are called with more than [B, d]."""
    seen: list[str] = []

    def hook(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.dim() > 2 and path not in seen:
                seen.append(path)

        return record

    handles = [
        module.register_forward_hook(hook(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(p.requires_grad for p in module.parameters())
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check_precise(dtypes: Mapping[str, torch.dtype], what: str) -> None:
    coarse = [dtype for dtype in dtypes.values() if torch.finfo(dtype).bits < 32]
    if coarse:
        raise ValueError(
            f"Expected {what} in float32 or float64 for Opacus (mode=ghost), got {coarse[0]}: it "
            "rounds norms to that type, and clipped gradients then exceed the clip norm. Use "
            "mode=hooks or another engine."
        )


def _known_flaw(module: nn.Module, mode: Mode) -> str | None:
    """What Opacus gets wrong about a module for some data only, so that a check may not show it."""
    if mode == "functorch" or not any(p.requires_grad for p in module.parameters(recurse=False)):
        return None
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        return "ignores padding_idx of the embedding"
    if isinstance(module, nn.EmbeddingBag):
        return "drops repeated ids of the bag"
    return None


def _disagreement(name: str, mode: Mode) -> ValueError:
    return ValueError(
        f"Opacus (mode={mode}) gives wrong per-sample gradients for '{name}': they do not agree "
        "with autograd's (a weight used outside its own module, for example). Use engine=vmap or "
        "engine=loop."
    )
