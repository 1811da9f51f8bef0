"""Where a weight comes from: a parameter, a view of one, or an expression of some."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from dpsgd.engines.graph import leaves
from dpsgd.engines.sharding import Names


@dataclass(frozen=True)
class Source:
    """A parameter that a weight was computed from.

    Attributes:
        name: The parameter's name.
        parameter: The parameter.
        weight: The weight as the captured function took it.
    """

    name: str
    parameter: Tensor
    weight: Tensor

    @property
    def same(self) -> bool:
        """Whether the weight is the parameter itself, entry by entry."""
        p, w = self.parameter, self.weight
        return w is p or (
            self.view
            and w.shape == p.shape
            and w.stride() == p.stride()
            and w.storage_offset() == p.storage_offset()
        )

    @property
    def view(self) -> bool:
        """Whether the weight holds some entries of the parameter, none of them twice."""
        p, w = self.parameter, self.weight
        if w is p:
            return True
        plain = w._base is p and w.dtype == p.dtype and not (w.is_conj() or w.is_neg())
        return plain and p.is_contiguous() and _injective(w)

    def place_in(self, total: Tensor) -> Tensor | None:
        """Returns the weight's part of a contiguous tensor like the parameter, None if none is."""
        if not self.view or not total.is_contiguous():
            return None
        p, w = self.parameter, self.weight
        if w is p:
            return total
        offset = w.storage_offset() - p.storage_offset() + total.storage_offset()
        return total.as_strided(w.shape, w.stride(), offset)

    @property
    def extent(self) -> tuple[int, int]:
        """First and last place in the parameter's memory that a view reaches, half open."""
        steps = zip(self.weight.shape, self.weight.stride())
        reach = sum((int(n) - 1) * int(step) for n, step in steps)
        start = int(self.weight.storage_offset())
        return start, start + reach + 1

    @property
    def dtype(self) -> torch.dtype:
        """The precision of sums of gradients: the parameter's, float32 at least."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    def pull(self, grads: Tensor) -> Tensor:
        """Returns gradients of the weight [b, *weight.shape] as ones of the parameter."""
        if self.same:
            return grads
        if self.view:
            p, w = self.parameter, self.weight
            pulled = grads.new_zeros((len(grads), *p.shape))
            offset = w.storage_offset() - p.storage_offset()
            pulled.as_strided(grads.shape, (p.numel(), *w.stride()), offset).copy_(grads)
            return pulled
        return self._pull_computed(grads)

    def _pull_computed(self, grads: Tensor) -> Tensor:
        """Through the expression, by autograd: it is linear in the gradient of the weight."""
        rows = grads.to(self.weight.dtype)
        with torch.enable_grad():
            try:
                (pulled,) = torch.autograd.grad(
                    self.weight, self.parameter, rows, retain_graph=True, is_grads_batched=True
                )
            except RuntimeError:  # an operation of the expression that vmap cannot run
                pulled = torch.stack([self._pull_one(row) for row in rows])
        return pulled.to(self.dtype)

    def _pull_one(self, row: Tensor) -> Tensor:
        try:
            return torch.autograd.grad(self.weight, self.parameter, row, retain_graph=True)[0]
        except RuntimeError as error:
            raise ValueError(
                f"The gradients of '{self.name}' go through an expression that has changed since "
                f"the engine's call: {error} Expected parameters unchanged until norms and sums "
                "are read."
            ) from error


def sources_of(weight: Tensor, names: Names) -> tuple[list[Source], list[Tensor]]:
    """Returns the parameters that a weight was computed from, and the leaves that are none.

    Args:
        weight: A tensor that requires a gradient and belongs to no sample.
        names: Names of the trainable parameters.
    """
    named = [(names.get(x), x) for x in leaves(weight)]
    known = [Source(name, x, weight) for name, x in named if name is not None]
    return known, [x for name, x in named if name is None]


def disjoint(sources: list[Source]) -> bool:
    """Whether views of one parameter hold different parts of it, so that squared norms add."""
    extents = sorted(source.extent for source in sources)
    return all(first[1] <= second[0] for first, second in itertools.pairwise(extents))


def _injective(w: Tensor) -> bool:
    """Whether no two entries of a strided tensor share their memory."""
    dims = sorted((step, n) for n, step in zip(w.shape, w.stride()) if n > 1)
    reach = 1
    for step, n in dims:
        if step < reach:
            return False
        reach = step * (n - 1) + reach
    return True
