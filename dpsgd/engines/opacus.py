"""The Opacus library (Yousefpour et al. 2021, arXiv:2109.12298) as an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd.engines.base import Engine, LossFn
from dpsgd.engines.batch import Batch, check_losses, map_tensors
from dpsgd.engines.grads import DenseGrads, PerSampleGrads
from dpsgd.engines.opacus_attachment import Mode, attached, named_errors
from dpsgd.engines.probe import RandomState, SizeProbe

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
        self._probe(self.model, batch, size, partial(self._check_sums, parameters=parameters))
        return self._gradients(batch, size, parameters)

    def _gradients(
        self, batch: Batch, size: int, parameters: Mapping[str, nn.Parameter]
    ) -> PerSampleGrads:
        if self.mode == "ghost":
            _check_precise(parameters)
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
            if norms[name].shape != (size,):
                raise _disagreement(name, self.mode)
        return losses, norms

    def _losses(self, view: Any, batch: Batch, size: int) -> Tensor:
        with named_errors(self.mode):
            losses = self.loss_fn(view, batch)
        losses = check_losses(losses, size)
        return losses if losses.requires_grad else losses.detach().requires_grad_()

    def _check_sums(self, batch: Batch, size: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raises unless the per-sample gradients add up to autograd's and have these norms."""
        for path, module in self.model.named_modules():
            flaw = _known_flaw(module, self.mode)
            if flaw is not None:
                raise ValueError(
                    f"Opacus (mode={self.mode}) {flaw} at '{path}': wrong per-sample gradients for "
                    "some batches. Use engine=vmap or engine=loop."
                )
        state = RandomState(self.model)
        grads = self._gradients(batch, size, parameters)
        norms, sums = grads._squared_norms(), grads.materialize()
        state.restore()
        losses = check_losses(self.loss_fn(self.model, batch), size)
        expected = _plain_gradients(losses, parameters)
        for name, reference in expected.items():
            total = sums[name].sum(0).to(reference.dtype)
            own = sums[name].flatten(1).double().norm(dim=1)
            known = torch.isfinite(norms[name])  # what is not gets weight 0
            norm = norms[name].sqrt().to(reference.dtype)
            if not (_close(total, reference) and _close(norm[known], own[known])):
                raise _disagreement(name, self.mode)


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
        super().__init__({name: p.shape for name, p in parameters.items()}, size)
        self._run, self._batch, self._parameters = run, batch, dict(parameters)
        self._random = random
        self._attached_losses, norms = run(batch, size)
        self._clean_losses: Tensor | None = None
        self._squares = {name: norm.detach().double().square() for name, norm in norms.items()}

    def _losses(self) -> Tensor:
        return self._attached_losses.detach()

    def _squared_norms(self) -> Mapping[str, Tensor]:
        return self._squares

    def _weighted_sum(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = self._finite_losses()
        by_column: dict[int, list[str]] = {}
        for name, column in columns.items():
            by_column.setdefault(id(column), []).append(name)
        sums = {}
        for names in by_column.values():
            objective = (losses * columns[names[0]].to(losses.dtype)).sum()
            chosen = {name: self._parameters[name] for name in names}
            sums.update(_plain_gradients(objective, chosen, retain_graph=True))
        return {
            name: sums[name].to(torch.promote_types(sums[name].dtype, torch.float32))
            for name in self._shapes
        }

    def _materialize(self) -> Mapping[str, Tensor]:
        rows = [
            _plain_gradients(loss, self._parameters, retain_graph=True)
            for loss in self._attached_losses.unbind()
        ]
        return {name: torch.stack([row[name] for row in rows]) for name in self._shapes}

    def _release(self) -> None:
        del self._attached_losses, self._run, self._batch
        self._clean_losses, self._squares, self._parameters = None, {}, {}

    def _finite_losses(self) -> Tensor:
        """The losses of a graph in which nothing is NaN, so that weight 0 gives exact zeros.

        Samples with non-finite gradients are replaced by copies of a finite one and the model runs
        again on the same random numbers; all losses are zero if no sample is finite.
        """
        finite = torch.stack([torch.isfinite(s) for s in self._squares.values()]).all(0)
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
        if row is not None and (not isinstance(row, Tensor) or row.shape != (size, *p.shape)):
            raise ValueError(
                f"Opacus gave no per-sample gradient [{size}, *shape] for '{name}': some layer "
                "does not see the samples in its first dimension. Use engine=vmap or engine=loop."
            )
        grads[name] = p.detach().new_zeros((size, *p.shape)) if row is None else row
    return grads


def _plain_gradients(
    losses: Tensor, parameters: Mapping[str, nn.Parameter], retain_graph: bool = False
) -> dict[str, Tensor]:
    if not losses.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    grads = torch.autograd.grad(
        losses.sum(),
        list(parameters.values()),
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(parameters, grads, strict=True))


def _check_precise(parameters: Mapping[str, nn.Parameter]) -> None:
    coarse = [name for name, p in parameters.items() if torch.finfo(p.dtype).bits < 32]
    if coarse:
        raise ValueError(
            f"Expected parameters in float32 or float64 for Opacus (mode=ghost), got "
            f"{parameters[coarse[0]].dtype}: it rounds norms to that type, and clipped gradients "
            "then exceed the clip norm. Use mode=hooks or another engine."
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


def _close(actual: Tensor, reference: Tensor) -> bool:
    """Whether two tensors agree but for rounding; an infinite or NaN reference tells nothing."""
    if not torch.isfinite(reference).all():
        return True
    tolerance = 0.05 if torch.finfo(actual.dtype).bits < 32 else 1e-3
    gap = (actual.double() - reference.double()).norm()
    return bool(gap <= tolerance * reference.double().norm() + 1e-6)


def _disagreement(name: str, mode: Mode) -> ValueError:
    return ValueError(
        f"Opacus (mode={mode}) gives wrong per-sample gradients for '{name}': they do not agree "
        "with autograd's (a weight used outside its own module, for example). Use engine=vmap or "
        "engine=loop."
    )
