"""Per-sample gradients held as they are."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from dpsgd.engines.grads import PerSampleGrads
from dpsgd.rules.rows import add_weighted_rows, dots, gram, squared_norms


class DenseGrads(PerSampleGrads):
    """Per-sample gradients held as they are, one tensor [B, *shape] per parameter."""

    def __init__(self, losses: Tensor, grads: Mapping[str, Tensor]) -> None:
        like = {name: grad.new_empty(()).expand(grad.shape[1:]) for name, grad in grads.items()}
        super().__init__(like, losses.shape[0])
        self._held_losses: Tensor | None = losses.detach()
        self._held = {name: grad.detach() for name, grad in grads.items()}
        self._squares: dict[str, Tensor] | None = None

    def _losses(self) -> Tensor:
        assert self._held_losses is not None
        return self._held_losses

    def _squared_norms(self) -> Mapping[str, Tensor]:
        if self._squares is None:
            self._squares = {name: squared_norms(grad) for name, grad in self._held.items()}
        return self._squares

    def _add_weighted_sum(
        self, columns: Mapping[str, Tensor], out: Mapping[str, Tensor], beta: float
    ) -> None:
        finite = {name: torch.isfinite(square) for name, square in self._squared_norms().items()}
        clean = bool(torch.stack(list(finite.values())).all())
        for name, grad in self._held.items():
            usable = None if clean else finite[name].nonzero()[:, 0]
            add_weighted_rows(out[name], columns[name], grad, usable, beta)

    def _materialize(self) -> Mapping[str, Tensor]:
        return self._held

    def _dot(self, direction: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([dots(self._held[name], v) for name, v in direction.items()]).sum(0)

    def _gram(self, names: Collection[str]) -> Tensor:
        return functools.reduce(torch.add, (gram(self._held[name]) for name in names))

    def _routes(self) -> dict[str, str]:
        return dict.fromkeys(self._shapes, "formed")

    def _release(self) -> None:
        self._held_losses, self._held, self._squares = None, {}, None
