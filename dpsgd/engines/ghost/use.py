"""One use of a parameter in a captured call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpsgd.engines.ghost.capture import EXPANDED
from dpsgd.engines.ghost.sources import Source
from dpsgd.rules import Call, Rule
from dpsgd.rules.rows import by_chunks, dots


@dataclass(frozen=True)
class Use:
    """One use of a parameter: a captured call, which argument it took, and from where."""

    rule: Rule
    call: Call
    argument: str
    source: Source

    @property
    def bytes_held(self) -> int:
        """What the call holds per sample."""
        tensors = [self.call.g, *(self.call[name] for name in self.call.samples)]
        return sum(x.numel() // max(1, len(x)) * x.element_size() for x in tensors)

    @property
    def bytes_formed(self) -> int:
        """The size of a sample's gradient of the weight."""
        return self.source.weight.numel() * self.source.dtype.itemsize

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What tells calls apart whose ways take different times, quick to be had."""
        samples = [self.call[name] for name in self.call.samples]
        tensors = (self.call.g, *samples, self.source.weight)
        return (self.rule, *((x.shape[1:], x.stride(), x.dtype) for x in tensors))

    @property
    def key(self) -> str:
        """The same in words that mean the same in another process."""
        call = self.call
        parts = [type(self.rule).__name__, self.argument, str(self.source.dtype)]
        for name in sorted(call.arguments):
            value = call[name]
            if isinstance(value, Tensor):
                shape = value.shape[1:] if name in call.samples else value.shape
                parts.append(f"{name}={tuple(shape)}{value.stride()}{value.dtype}")
            else:
                parts.append(f"{name}={value}")
        parts.append(f"g={tuple(call.g.shape[1:])}{call.g.stride()}")
        return " ".join(parts)

    def wide(self) -> Call:
        """The call in the precision that norms and sums are taken in, float32 at least."""
        return self.call.to(torch.promote_types(self.source.weight.dtype, self.source.dtype))

    def formed(self, call: Call, way: Callable[[Call], Tensor] | None = None) -> Tensor:
        """The gradients of the parameter for the samples of `call`, [b, *parameter.shape].

        Args:
            call: The samples.
            way: How to form them; as the rule does by default.
        """
        formed = self.rule.materialize(call, self.argument) if way is None else way(call)
        expected = (call.size, *self.source.weight.shape)
        if formed.shape != expected:
            raise ValueError(
                f"Expected the rule {type(self.rule).__name__} to return gradients of shape "
                f"{list(expected)} for '{self.argument}' (of '{self.source.name}'), got "
                f"{list(formed.shape)}."
            )
        return self.source.pull(formed)

    def pulled(self) -> Use:
        """The use as one of the parameter itself, its gradients formed now.

        For an expression of parameters that are whole only while their module runs.
        """
        p = self.source.parameter
        call = Call({"weight": p}, frozenset(), self.formed(self.wide()))
        return Use(EXPANDED, call, "weight", Source(self.source.name, p, p))

    def add_weighted_sum(self, call: Call, weights: Tensor, out: Tensor, beta: float) -> None:
        """Makes `out` beta * out + the sum of the gradients of `call`, weighted, of the parameter.

        A weight that is a part of the parameter, one block in memory, is summed in place.
        """
        part = self.source.place_in(out)
        if part is not None:
            if beta == 0 and part.numel() < out.numel():
                out.zero_()
            self.rule.add_weighted_sum(call, self.argument, weights, part, beta)
            return
        total = self.rule.weighted_sum(call, self.argument, weights)
        total = self.source.pull(total.view(1, *self.source.weight.shape))[0]
        if beta:
            out.add_(total)
        else:
            out.copy_(total)

    def dots(self, direction: Tensor) -> Tensor:
        """The products of the gradients of the parameter with a direction like it, [b]."""
        call = self.wide()
        direction = direction.to(call.g.dtype)
        part = self.source.place_in(direction)
        if part is not None:
            return self.rule.dots(call, self.argument, part)
        size = direction.numel() * direction.element_size()
        return by_chunks(
            call.size, size, lambda rows: dots(self.formed(call.rows(rows)), direction)
        )

    def route(self) -> str:
        """How the gradient comes about, in words."""
        how = "expanded" if self.rule is EXPANDED else type(self.rule).__name__.lower()
        return how if self.source.view else f"{how} (computed)"


def merged(uses: Sequence[Use], known: dict[tuple[int, ...], Call | None]) -> list[Use]:
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
