"""Per-sample gradients from tapes: norms and sums from inputs and output gradients of calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd.engines.ghost.part import Part
from dpsgd.engines.ghost.physical import plainly
from dpsgd.engines.grads import PerSampleGrads
from dpsgd.rules.rows import gram


class TapedGrads(PerSampleGrads):
    """Per-sample gradients held as what captured calls saved and the gradients of their outputs.

    Norms come from these pairs without forming the gradients where that is less work, the weighted
    sum from one contraction of inputs with re-weighted output gradients (book-keeping: Bu et al.
    2022, arXiv:2210.00038).
    """

    def __init__(self, parts: Sequence[Part], parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters, sum(len(part.rows) for part in parts))
        self._parts = list(parts)
        self._order = torch.cat([part.rows for part in parts]).argsort()

    def _losses(self) -> Tensor:
        return self._gathered([part.losses for part in self._parts])

    def _squared_norms(self) -> Mapping[str, Tensor]:
        return self._of_each(lambda part, name: part.squared_norms(name))

    def _add_weighted_sum(
        self, columns: Mapping[str, Tensor], out: Mapping[str, Tensor], beta: float
    ) -> None:
        with self._plainly():
            for part in self._parts:
                for name, column in columns.items():
                    own = column if len(self._parts) == 1 else column[part.rows]
                    part.add_weighted_sum(name, own, out[name], beta)
                beta = 1.0

    def _materialize(self) -> Mapping[str, Tensor]:
        return self._of_each(lambda part, name: part.materialize(name))

    def _dot(self, direction: Mapping[str, Tensor]) -> Tensor:
        with self._plainly():
            found = [
                self._gathered([part.dots(name, v) for part in self._parts])
                for name, v in direction.items()
            ]
        return torch.stack(found).sum(0)

    def _gram(self, names: Collection[str]) -> Tensor:
        with self._plainly():
            return functools.reduce(torch.add, map(self._gram_of, names))

    def _gram_of(self, name: str) -> Tensor:
        if len(self._parts) == 1:
            return self._parts[0].gram(name)
        return gram(self._gathered([part.materialize(name) for part in self._parts]))

    def _routes(self) -> dict[str, str]:
        words: dict[str, dict[str, None]] = {name: {} for name in self._shapes}
        for part in self._parts:
            for name, routes in part.routes.items():
                how = f", {part.chosen[name].name}" if name in part.chosen else ""
                words[name].update({route + how: None for route in routes})
        return {name: " + ".join(found) or "unused" for name, found in words.items()}

    def _release(self) -> None:
        self._parts = []

    def _of_each(self, what: Callable[[Part, str], Tensor]) -> dict[str, Tensor]:
        with self._plainly():
            return {
                name: self._gathered([what(part, name) for part in self._parts])
                for name in self._shapes
            }

    def _gathered(self, values: Sequence[Tensor]) -> Tensor:
        return values[0] if len(values) == 1 else torch.cat(list(values))[self._order]

    def _plainly(self) -> Any:
        return plainly(self._parts[0].losses.device.type)
