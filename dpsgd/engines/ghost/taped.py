"""Per-sample gradients from tapes: norms and sums from inputs and output gradients of calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd.engines.ghost.capture import EXPANDED
from dpsgd.engines.ghost.sources import Source, disjoint, sources_of
from dpsgd.engines.ghost.tape import Record
from dpsgd.engines.grads import PerSampleGrads
from dpsgd.rules import Call, Rule
from dpsgd.rules.rows import by_chunks, chunks, squared_norms, weighted_rows

KEPT_SHARE = 1.0
"""Gradients are formed and kept where they take at most this share of what calls hold anyway."""


@dataclass(frozen=True)
class Use:
    """One use of a parameter: a captured call, which argument it took, and from where."""

    rule: Rule
    call: Call
    argument: str
    source: Source

    @property
    def bytes_held(self) -> int:
        """What the call holds of the samples."""
        tensors = [self.call.g, *(self.call[name] for name in self.call.samples)]
        return sum(x.numel() * x.element_size() for x in tensors)

    def wide(self) -> Call:
        """The call in the precision that norms and sums are taken in, float32 at least."""
        return self.call.to(torch.promote_types(self.source.weight.dtype, self.source.dtype))

    def formed(self, call: Call) -> Tensor:
        """The gradients of the parameter for the samples of `call`, [b, *parameter.shape]."""
        formed = self.rule.materialize(call, self.argument)
        expected = (call.size, *self.source.weight.shape)
        if formed.shape != expected:
            raise ValueError(
                f"Expected the rule {type(self.rule).__name__} to return gradients of shape "
                f"{list(expected)} for '{self.argument}' (of '{self.source.name}'), got "
                f"{list(formed.shape)}."
            )
        return self.source.pull(formed)

    def route(self) -> str:
        """How the gradient comes about, in words."""
        how = "expanded" if self.rule is EXPANDED else type(self.rule).__name__.lower()
        return how if self.source.view else f"{how} (computed)"


class Part:
    """Samples that went through the loss together, and the uses of each parameter.

    Attributes:
        rows: Their places in the batch [b].
        losses: Their losses [b].
        uses: The uses of each parameter.
        foreign: Trainable leaves that the losses use and that are no parameters.
    """

    def __init__(
        self,
        rows: Tensor,
        losses: Tensor,
        records: Sequence[Record],
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        self.rows = rows
        self.losses = losses
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self._dtypes = {
            n: torch.promote_types(p.dtype, torch.float32) for n, p in parameters.items()
        }
        self.uses: dict[str, list[Use]] = {name: [] for name in parameters}
        self.foreign: list[Tensor] = []
        self._formed: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._by_rows: set[str] = set()
        names = {id(p): name for name, p in parameters.items()}
        known: dict[int, tuple[list[Source], list[Tensor]]] = {}
        for record in records:
            for argument in record.site.wanted:
                weight = record.call[argument]
                if id(weight) not in known:
                    known[id(weight)] = sources_of(weight, names)
                    self.foreign += known[id(weight)][1] if weight.numel() else []
                for source in known[id(weight)][0]:
                    use = Use(record.site.rule, record.call, argument, source)
                    self.uses[source.name].append(use)
        merged: dict[tuple[int, ...], Call | None] = {}
        self.uses = {name: _merged(uses, merged) for name, uses in self.uses.items()}

    def squared_norms(self, name: str) -> Tensor:
        """Squared norms of the gradients of one parameter, [b]."""
        if name not in self._squares:
            self._squares[name] = self._norms(name)
        return self._squares[name]

    def weighted_sum(self, name: str, weights: Tensor) -> Tensor:
        """The sum of the gradients of one parameter, weighted by [b]; 0 on what is not finite."""
        usable = torch.isfinite(self.squared_norms(name))
        index = None if usable.all() else usable.nonzero()[:, 0]
        if name in self._formed:
            return weighted_rows(weights, self._formed[name], index)
        if name in self._by_rows:
            return self._sum_formed(name, weights, usable)
        total: Tensor | None = None
        for use in self.uses[name]:
            call = use.wide() if index is None else use.wide().rows(index)
            own = weights if index is None else weights[index]
            part = use.rule.weighted_sum(call, use.argument, own)
            part = use.source.pull(part.view(1, *use.source.weight.shape))[0]
            total = part if total is None else total + part
        return self._zeros(name) if total is None else total

    def materialize(self, name: str) -> Tensor:
        """The gradients of one parameter, [b, *shape]."""
        if name in self._formed:
            return self._formed[name]
        return self._form(name, slice(None))

    def _norms(self, name: str) -> Tensor:
        uses = self.uses[name]
        if not uses:
            return self.losses.new_zeros(len(self.rows), dtype=torch.float64)
        size = len(self.rows) * self._bytes_per_row(name)
        if size <= KEPT_SHARE * sum(use.bytes_held for use in uses):
            self._formed[name] = self._form(name, slice(None))  # no larger than what it replaces
            return squared_norms(self._formed[name])
        return self._norms_unformed(uses) if self._separable(uses) else self._norms_formed(name)

    def _separable(self, uses: Sequence[Use]) -> bool:
        """Whether the norms of the uses are those of their weights."""
        return all(use.source.view for use in uses)

    def _norms_unformed(self, uses: Sequence[Use]) -> Tensor:
        calls = [use.wide() for use in uses]
        squares = [u.rule.squared_norms(c, u.argument) for u, c in zip(uses, calls)]
        total = torch.stack(squares).sum(0)
        if len(uses) == 1 or disjoint([use.source for use in uses]):
            return total
        crosses = []
        for (u, c), (v, d) in itertools.combinations(zip(uses, calls), 2):
            if not (u.source.same and v.source.same):
                return self._norms_formed(u.source.name)
            cross = u.rule.cross(c, u.argument, v.rule, d, v.argument)
            if cross is None:
                cross = v.rule.cross(d, v.argument, u.rule, c, u.argument)
            if cross is None:
                return self._norms_formed(u.source.name)
            crosses.append(cross)
        return self._unless_cancelled(uses, total, 2 * torch.stack(crosses).sum(0))

    def _unless_cancelled(self, uses: Sequence[Use], alone: Tensor, crossed: Tensor) -> Tensor:
        """Alone + crossed, rounded up; formed instead where that cancels."""
        squares = alone + crossed
        spreads = [use.rule.spread(use.wide(), use.argument) for use in uses]
        eps = torch.finfo(uses[0].source.dtype).eps
        error = 4 * eps * torch.stack(spreads).sum(0).square()
        if (error <= 1e-3 * squares).all():  # false for NaN
            return squares + error
        return self._norms_formed(uses[0].source.name)

    def _norms_formed(self, name: str) -> Tensor:
        """The norms of the gradients as they are formed; the sum will be one of the same rows.

        Terms that cancel leave a rounding error behind, another one in every order of summation: a
        norm is only right for the very rows that it was taken of.
        """
        self._by_rows.add(name)
        return by_chunks(
            len(self.rows),
            self._bytes_per_row(name),
            lambda rows: squared_norms(self._form(name, rows)),
        )

    def _sum_formed(self, name: str, weights: Tensor, usable: Tensor) -> Tensor:
        sums = [
            weighted_rows(weights[rows], self._form(name, rows), usable[rows])
            for rows in chunks(len(self.rows), self._bytes_per_row(name))
        ]
        return torch.stack(sums).sum(0)

    def _bytes_per_row(self, name: str) -> int:
        return self.shapes[name].numel() * self.uses[name][0].call.g.element_size()

    def _form(self, name: str, rows: slice | Tensor) -> Tensor:
        total: Tensor | None = None
        for use in self.uses[name]:
            call = use.wide().rows(rows)
            formed = use.formed(call)
            total = formed if total is None else total + formed
        if total is None:
            return self._zeros(name).expand(len(self.rows), *self.shapes[name])[rows]
        return total

    def _zeros(self, name: str) -> Tensor:
        return self.losses.new_zeros(self.shapes[name], dtype=self._dtypes[name])


class TapedGrads(PerSampleGrads):
    """Per-sample gradients held as what captured calls saved and the gradients of their outputs.

    Norms come from these pairs without forming the gradients where that is less work, the weighted
    sum from one contraction of inputs with re-weighted output gradients (book-keeping: Bu et al.
    2022, arXiv:2210.00038).
    """

    def __init__(self, parts: Sequence[Part], parameters: Mapping[str, nn.Parameter]) -> None:
        shapes = {name: p.shape for name, p in parameters.items()}
        super().__init__(shapes, sum(len(part.rows) for part in parts))
        self._parts = list(parts)
        self._order = torch.cat([part.rows for part in parts]).argsort()

    def _losses(self) -> Tensor:
        return self._gathered([part.losses for part in self._parts])

    def _squared_norms(self) -> Mapping[str, Tensor]:
        return self._of_each(lambda part, name: part.squared_norms(name))

    def _weighted_sum(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self._plainly():
            return {
                name: torch.stack(
                    [part.weighted_sum(name, column[part.rows]) for part in self._parts]
                ).sum(0)
                if len(self._parts) > 1
                else self._parts[0].weighted_sum(name, column)
                for name, column in columns.items()
            }

    def _materialize(self) -> Mapping[str, Tensor]:
        return self._of_each(lambda part, name: part.materialize(name))

    def _routes(self) -> dict[str, str]:
        words: dict[str, dict[str, None]] = {name: {} for name in self._shapes}
        for part in self._parts:
            for name, uses in part.uses.items():
                words[name].update(dict.fromkeys(use.route() for use in uses))
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
        return _plainly(self._parts[0].losses.device.type)


@contextmanager
def _plainly(device: str) -> Iterator[None]:
    """Without gradients, autocast or inference mode, whatever is on around."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def _merged(uses: Sequence[Use], known: dict[tuple[int, ...], Call | None]) -> list[Use]:
    """The uses with those in one that take the same weight by the same rule.

    Args:
        uses: The uses of one parameter.
        known: Calls merged so far, by the ids of their parts: weight and bias have the same.
    """
    groups: dict[Any, list[Use]] = {}
    for use in uses:
        weight = use.source.parameter if use.source.same else use.source.weight
        groups.setdefault((use.rule, use.argument, id(weight)), []).append(use)
    merged = []
    for alike in groups.values():
        first, calls = alike[0], [use.call for use in alike]
        key = tuple(map(id, calls))
        if key not in known:
            known[key] = first.rule.merge(calls) if len(calls) > 1 else None
        call = known[key]
        merged += alike if call is None else [replace(first, call=call)]
    return merged
