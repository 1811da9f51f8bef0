"""Samples that went through the loss together: norms and sums, one parameter at a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from dpsgd.engines.ghost.physical import outside_vmap, plainly
from dpsgd.engines.ghost.sources import Source, disjoint, sources_of
from dpsgd.engines.ghost.strategies import Strategies, Strategy
from dpsgd.engines.ghost.tape import Record, Site
from dpsgd.engines.ghost.use import Use, merged
from dpsgd.engines.sharding import Names
from dpsgd.rules import Call
from dpsgd.rules.rows import add_weighted_rows, by_chunks, chunks, dots, gram, squared_norms, wide

KEPT_SHARE = 1.0
"""Gradients are formed and kept where they take at most this share of what calls hold anyway."""


class Part:
    """Samples that went through the loss together, and the uses of each parameter.

    Attributes:
        rows: Their places in the batch [b].
        losses: Their losses [b], once the backward pass is done.
        uses: The uses of each parameter, as far as they are still needed.
        routes: How the gradients of each parameter come about, in words.
        chosen: The strategies of parameters that do not go by formulas.
        foreign: Trainable leaves that the losses use and that are no parameters.
    """

    def __init__(
        self,
        rows: Tensor,
        parameters: Mapping[str, nn.Parameter],
        names: Names,
        strategies: Strategies,
        size: int,
    ) -> None:
        self.rows = rows
        self.losses = rows
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.uses: dict[str, list[Use]] = {name: [] for name in parameters}
        self.routes: dict[str, dict[str, None]] = {name: {} for name in parameters}
        self.foreign: list[Tensor] = []
        self.chosen: dict[str, Strategy] = {}
        self._dtypes = {
            n: torch.promote_types(p.dtype, torch.float32) for n, p in parameters.items()
        }
        self._strategies = strategies
        self._size = size
        self._names = names
        self._sources: dict[int, list[Source]] = {}
        self._weights: list[Tensor] = []  # keeps the ids of weights from being used again
        self._expected = dict.fromkeys(parameters, 0)
        self._order: dict[str, None] = {}
        self._formed: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._by_rows: set[str] = set()

    def expect(self, sites: Iterable[Site]) -> None:
        """Learns what calls there are before the backward pass brings their gradients."""
        for site in sites:
            for argument in site.wanted:
                for source in self._sources_of(site.arguments[argument]):
                    self._expected[source.name] += 1

    def take(self, record: Record) -> None:
        """Takes a call with its gradient; norms are settled at once where this is the only use.

        What the call holds is in cache now, and what it holds need not be held for long where the
        gradient is formed.
        """
        with outside_vmap(), plainly(self.rows.device.type):
            for argument in record.site.wanted:
                for source in self._sources_of(record.call[argument]):
                    use = Use(record.site.rule, record.call, argument, source)
                    gone_later = self._names.sharded and not source.view
                    self._take(use.pulled() if gone_later else use)

    def _take(self, use: Use) -> None:
        name = use.source.name
        if name in self._squares:  # its norm is settled already: it would not count this gradient
            raise ValueError(
                f"engine=ghost cannot run this model: '{name}' got more gradients than the forward "
                "pass made calls (a function that runs the model again in its backward pass?). Use "
                "engine=loop."
            )
        self._order[name] = None
        self.uses[name].append(use)
        self.routes[name][use.route()] = None
        if self._expected[name] == 1 and use.source.view:
            planned, strategy = self._strategies.planned(name, use, self._size)
            if planned:
                if strategy is not None:
                    self.chosen[name] = strategy
                self.squared_norms(name)

    def finish(self, losses: Tensor, activations: int) -> None:
        """Ends the backward pass: what is used several times is merged, strategies are chosen.

        Args:
            losses: The losses [b].
            activations: Bytes per sample that the forward pass held for the backward pass.
        """
        self.losses = losses
        self._sources, self._weights = {}, []
        known: dict[tuple[int, ...], Call | None] = {}
        waiting = {name: uses for name, uses in self.uses.items() if name not in self._squares}
        for name, uses in waiting.items():
            if len(uses) > 1:
                self.uses[name] = merged(uses, known)
        waiting = {n: self.uses[n] for n in self._order if n in waiting}  # of the backward pass
        self.chosen |= self._strategies.choose(waiting, self._size, activations)

    def _sources_of(self, weight: Tensor) -> list[Source]:
        if id(weight) not in self._sources:
            found, foreign = sources_of(weight, self._names)
            self.foreign += foreign if weight.numel() else []
            self._sources[id(weight)] = found
            self._weights.append(weight)
        return self._sources[id(weight)]

    def squared_norms(self, name: str) -> Tensor:
        """Squared norms of the gradients of one parameter, [b]."""
        if name not in self._squares:
            self._squares[name] = self._norms(name)
        return self._squares[name]

    def add_weighted_sum(self, name: str, weights: Tensor, out: Tensor, beta: float) -> None:
        """Makes `out` beta * out + the sum of the gradients of one parameter, weighted by [b].

        Weights on gradients that are not finite are 0.
        """
        usable = None if self._all_finite else torch.isfinite(self.squared_norms(name))
        index = None if usable is None else usable.nonzero()[:, 0]
        if name in self._formed:
            add_weighted_rows(out, weights, self._formed[name], index, beta)
        elif name in self._by_rows:
            for rows in chunks(len(self.rows), self._bytes_per_row(name)):
                some = None if usable is None else usable[rows].nonzero()[:, 0]
                add_weighted_rows(out, weights[rows], self._form(name, rows), some, beta)
                beta = 1.0
        else:
            weights = weights if index is None else weights[index]
            for use in self.uses[name]:
                call = use.wide() if index is None else use.wide().rows(index)
                use.add_weighted_sum(call, weights, out, beta)
                beta = 1.0
            if not self.uses[name] and not beta:
                out.zero_()

    @cached_property
    def _all_finite(self) -> bool:
        squares = torch.stack([self.squared_norms(name) for name in self.uses])
        return bool(torch.isfinite(squares).all())

    def materialize(self, name: str) -> Tensor:
        """The gradients of one parameter, [b, *shape]."""
        if name in self._formed:
            return self._formed[name]
        return self._form(name, slice(None))

    def dots(self, name: str, direction: Tensor) -> Tensor:
        """The products of the gradients of one parameter with a direction, [b]."""
        if name in self._formed:
            return dots(self._formed[name], direction)
        total = self.rows.new_zeros(len(self.rows), dtype=wide(direction))
        return functools.reduce(torch.add, (use.dots(direction) for use in self.uses[name]), total)

    def gram(self, name: str) -> Tensor:
        """The products of the gradients of one parameter with each other, [b, b].

        Uses of different parts of it add up; several uses of the same have cross terms, and what
        the parameter is computed into its own derivative: their gradients are formed.
        """
        uses = self.uses[name]
        if not uses or not self._apart(uses):
            return gram(self.materialize(name))
        return torch.stack([use.rule.gram(use.wide(), use.argument) for use in uses]).sum(0)

    def _norms(self, name: str) -> Tensor:
        uses = self.uses[name]
        if not uses:
            return self.rows.new_zeros(len(self.rows), dtype=torch.float64)
        strategy = self.chosen.get(name)
        if strategy is not None and strategy.norms is not None:
            return strategy.norms(uses[0].wide())
        size = self._bytes_per_row(name)
        if strategy is not None or size <= KEPT_SHARE * sum(use.bytes_held for use in uses):
            self._formed[name] = self._form(name, slice(None))
            self.uses[name] = []  # the call is not needed any more
            return squared_norms(self._formed[name])
        return self._norms_unformed(uses) if self._separable(uses) else self._norms_formed(name)

    def _separable(self, uses: Sequence[Use]) -> bool:
        """Whether the norms of the uses are those of their weights."""
        return all(use.source.view for use in uses)

    def _apart(self, uses: Sequence[Use]) -> bool:
        """Whether the uses are of different entries of the parameter."""
        sources = [use.source for use in uses]
        return self._separable(uses) and (len(uses) == 1 or disjoint(sources))

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

    def _bytes_per_row(self, name: str) -> int:
        return self.shapes[name].numel() * self.uses[name][0].call.g.element_size()

    def _form(self, name: str, rows: slice | Tensor) -> Tensor:
        total: Tensor | None = None
        strategy = self.chosen.get(name)
        for use in self.uses[name]:
            call = use.wide().rows(rows)
            formed = use.formed(call, None if strategy is None else strategy.form)
            total = formed if total is None else total + formed
        if total is None:
            return self._zeros(name).expand(len(self.rows), *self.shapes[name])[rows]
        return total

    def _zeros(self, name: str) -> Tensor:
        return self.rows.new_zeros(self.shapes[name], dtype=self._dtypes[name])
