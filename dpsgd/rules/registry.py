"""What a rule is, and the table of rules: function -> rule."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from dpsgd.rules.rows import by_chunks, chunks, dots, gram, squared_norms, weighted_rows


@dataclass(frozen=True)
class Call:
    """One call of a function in which samples met weights, and what came back to its output.

    Attributes:
        arguments: The arguments by name. What belongs to samples is [B, ...], B before the
            dimensions that the function was called with for one sample; weights are as they are.
        samples: Names of the arguments that belong to samples.
        g: Gradient of the sum of the losses with respect to the output, [B, ...].
    """

    arguments: Mapping[str, Any]
    samples: frozenset[str]
    g: Tensor

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def size(self) -> int:
        """B."""
        return self.g.shape[0]

    def rows(self, index: slice | Tensor) -> Call:
        """Returns the call for some of the samples."""
        chosen = {name: self.arguments[name][index] for name in self.samples}
        return replace(self, arguments={**self.arguments, **chosen}, g=self.g[index])

    def to(self, dtype: torch.dtype) -> Call:
        """Returns the call with the floating tensors of its samples in another precision."""
        cast = {
            name: value.to(dtype)
            for name in self.samples
            if (value := self.arguments[name]).is_floating_point()
        }
        return replace(self, arguments={**self.arguments, **cast}, g=self.g.to(dtype))

    def like(self, size: int) -> Call:
        """Returns a call of the same shapes on made-up samples, `size` of them."""
        made = {name: _made_up(self.arguments[name], size) for name in self.samples}
        return replace(self, arguments={**self.arguments, **made}, g=_made_up(self.g, size))


def _made_up(x: Tensor, size: int) -> Tensor:
    """Random numbers laid out in memory as x is, zeros for whole numbers."""
    shape = (size, *x.shape[1:])
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, x.stride()))
    memory = torch.zeros(reach, dtype=x.dtype, device=x.device)
    if x.is_floating_point():
        source = torch.Generator(x.device).manual_seed(0)
        memory.normal_(generator=source)
    return memory.as_strided(shape, x.stride())


@dataclass(frozen=True)
class Ways:
    """Ways to the same numbers for one weight of a call, by name, to be timed against each other.

    Attributes:
        forms: Ways to form the gradients [B, *weight.shape], dense in any order of dimensions.
        norms: Ways to the squared norms [B] that leave nothing formed behind, rounded up where the
            weighted sum is not one of the very rows that the norms are taken of.
    """

    forms: Mapping[str, Callable[[Call], Tensor]]
    norms: Mapping[str, Callable[[Call], Tensor]]


NO_WAYS = Ways({}, {})


class Rule(ABC):
    """The per-sample gradients of one function with respect to its weights.

    A rule must say how to run the function on a whole batch and how to form the gradients; norms
    and weighted sums follow from these. It overrides those two where there is a cheaper way.

    Attributes:
        weights: Names of the arguments that may be weights: the same tensor for all samples.
        samples: Names of the arguments that belong to samples. The first must be given as such.
    """

    weights: ClassVar[tuple[str, ...]]
    samples: ClassVar[tuple[str, ...]]

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the function on the batch, [B, ...] for samples; its signature names the arguments.

        Of a tuple only the first entry is differentiable.
        """

    @abstractmethod
    def materialize(self, call: Call, name: str) -> Tensor:
        """Returns the gradient of each sample for the weight `name`, [B, *weight.shape]."""

    def accepts(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the rule covers these arguments; samples have their dimensions without B here."""
        return True

    def squared_norms(self, call: Call, name: str) -> Tensor:
        """Returns the squared norms of these gradients, [B], in float64 where there is any."""
        return by_chunks(
            call.size,
            gradient_bytes(call, name),
            lambda rows: squared_norms(self.materialize(call.rows(rows), name)),
        )

    def weighted_sum(self, call: Call, name: str, weights: Tensor) -> Tensor:
        """Returns sum_i w_i g_i of the shape of the weight, for weights [B]."""
        total = call[name].new_zeros(call[name].shape, dtype=call.g.dtype)
        for rows in chunks(call.size, gradient_bytes(call, name)):
            total += weighted_rows(weights[rows], self.materialize(call.rows(rows), name))
        return total

    def add_weighted_sum(
        self, call: Call, name: str, weights: Tensor, out: Tensor, beta: float
    ) -> None:
        """Makes `out` beta * out + sum_i w_i g_i; with beta = 0 whatever it holds is forgotten."""
        total = self.weighted_sum(call, name, weights)
        if beta:
            out.add_(total)
        else:
            out.copy_(total)

    def dots(self, call: Call, name: str, direction: Tensor) -> Tensor:
        """Returns <g_i, v> [B] for a direction of the shape of the weight."""
        return by_chunks(
            call.size,
            gradient_bytes(call, name),
            lambda rows: dots(self.materialize(call.rows(rows), name), direction),
        )

    def gram(self, call: Call, name: str) -> Tensor:
        """Returns <g_i, g_j> of all pairs of samples, [B, B]."""
        return gram(self.materialize(call, name))

    def ways(self, call: Call, name: str) -> Ways:
        """Returns what there is to choose from for a weight of a call; nothing by default."""
        return NO_WAYS

    def merge(self, calls: Sequence[Call]) -> Call | None:
        """Returns one call that stands for several with one weight; None if there is none."""
        return None

    def cross(self, call: Call, name: str, rule: Rule, other: Call, argument: str) -> Tensor | None:
        """Returns <G_i, H_i> [B] with the gradients H of another rule for the same weight, or None.

        None stands for no other way than to form both.
        """
        return None

    def spread(self, call: Call, name: str) -> Tensor:
        """Returns what bounds the rounding error of the gradients, over eps: [B], in float64.

        The sum of the norms of the terms that a gradient consists of. A rule with a way to `cross`
        has more than one term and says so.
        """
        return self.squared_norms(call, name).sqrt()

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the arguments of a call by name; None if they are not those of the rule."""
        names, defaults = self._signature
        if len(args) > len(names):
            return None
        arguments = {**defaults, **dict(zip(names, args)), **kwargs}
        return arguments if arguments.keys() == set(names) else None

    @cached_property
    def _signature(self) -> tuple[list[str], dict[str, Any]]:
        parameters = inspect.signature(self.forward).parameters
        defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
        return list(parameters), defaults


def gradient_bytes(call: Call, name: str) -> int:
    """Returns the size of one sample's gradient for a weight."""
    return math.prod(call[name].shape) * call.g.element_size()


_RULES: dict[Callable[..., Any], Rule] = {}
_R = TypeVar("_R", bound=type[Rule])


def register(*functions: Callable[..., Any]) -> Callable[[_R], _R]:
    """Returns a decorator that makes a `Rule` class the rule of these functions.

    Args:
        functions: Overridable functions of PyTorch as they are called in the end: `torch.prelu`,
            `torch.layer_norm`, `torch.Tensor.matmul`.

    Raises:
        ValueError: If there is a rule already (the same class again replaces itself, so that a
            cell of a notebook can run twice), or its names are not arguments of its forward.
    """

    def decorate(kind: _R) -> _R:
        add(kind(), *functions)
        return kind

    return decorate


def add(rule: Rule, *functions: Callable[..., Any]) -> None:
    """Makes a rule that of some functions, as `register` does for a class of its own.

    Raises:
        ValueError: If there is a rule already.
    """
    names, _ = rule._signature
    unknown = [name for name in (*rule.samples, *rule.weights) if name not in names]
    if unknown:
        raise ValueError(
            f"Expected samples and weights of {type(rule).__name__} to be arguments of its "
            f"forward, {names}, got {unknown}."
        )
    for function in functions:
        if function in _RULES and not _same_class(_RULES[function], rule):
            raise ValueError(f"Expected no rule yet for {function}, got a second one.")
        _RULES[function] = rule


def _same_class(first: Rule, second: Rule) -> bool:
    one, other = type(first), type(second)
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def lookup(function: Callable[..., Any]) -> Rule | None:
    """Returns the rule of a function, None if there is none."""
    return _RULES.get(function)
