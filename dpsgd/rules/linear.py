"""Linear maps: y = a W^T + b in its spellings, and their bilinear cousin.

Letters: B samples, T positions sharing the weight, d fan-in, p fan-out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.rules.registry import NO_WAYS, Call, Rule, Ways, register
from dpsgd.rules.rows import (
    add_product,
    formed_norms,
    gram_by_parts,
    gram_norms,
    pair_products,
    product_norms,
    spread,
    wide,
)


class Affine(Rule):
    """G_i = sum_t g_it a_it^T [B, p, d] for the weight, sum_t g_it [B, p] for the bias.

    Attributes:
        transposed: Whether the weight is written [d, p].
    """

    transposed: ClassVar[bool]

    def materialize(self, call: Call, name: str) -> Tensor:
        """Returns G_i, or the sum over the positions for the bias."""
        a, g = self.operands(call)
        if name != self.weights[0]:
            return g[:, 0] if g.shape[1] == 1 else g.sum(1)
        return torch.bmm(a.transpose(1, 2), g) if self.transposed else torch.bmm(g.mT, a)

    def squared_norms(self, call: Call, name: str) -> Tensor:
        """Returns ||G_i||^2 by Gram matrices or by forming G_i, whichever is less."""
        if name != self.weights[0]:
            return super().squared_norms(call, name)
        return product_norms(*self.operands(call))

    def weighted_sum(self, call: Call, name: str, weights: Tensor) -> Tensor:
        """Returns sum_it (w_i g_it) a_it^T: an ordinary weight gradient."""
        out = torch.empty(call[name].shape, dtype=call.g.dtype, device=call.g.device)
        self.add_weighted_sum(call, name, weights, out, 0.0)
        return out

    def add_weighted_sum(
        self, call: Call, name: str, weights: Tensor, out: Tensor, beta: float
    ) -> None:
        """Adds to `out` in the matrix product itself, the narrower factor re-weighted."""
        a, g = self.operands(call)
        weights = weights.to(g.dtype)
        if name != self.weights[0]:
            add_product(out, self.materialize(call, name).T, weights, beta)
            return
        column = weights[:, None, None]
        if g.stride(0) < g.stride(1):  # positions first in memory, as in recurrent networks
            a, g, column = a.transpose(0, 1), g.transpose(0, 1), column.transpose(0, 1)
        if a.shape[2] < g.shape[2]:
            a = a * column
        else:
            g = g * column
        a, g = a.flatten(0, 1), g.flatten(0, 1)
        add_product(out, *((a.T, g) if self.transposed else (g.T, a)), beta)

    def dots(self, call: Call, name: str, direction: Tensor) -> Tensor:
        """Returns sum_t g_it . (V a_it): what the map with V for a weight would give, times g."""
        if name != self.weights[0]:
            return super().dots(call, name, direction)
        a, g = self.operands(call)
        products = (a @ (direction if self.transposed else direction.T)).mul_(g)
        return products.sum((1, 2), dtype=wide(g))

    def gram(self, call: Call, name: str) -> Tensor:
        """Returns sum_ts (a_it . a_js) (g_it . g_js), or that of G_i formed in parts if less work.

        For T = 1 it is the entrywise product of two Gram matrices of samples.
        """
        if name != self.weights[0]:
            return super().gram(call, name)
        a, g = self.operands(call)
        (size, positions, d), p = a.shape, g.shape[2]
        if size * positions**2 * (d + p) <= (size + positions) * d * p:
            return pair_products(a, g)
        return gram_by_parts(
            p, size * d * g.element_size(), lambda some: torch.bmm(g[:, :, some].mT, a)
        )

    def ways(self, call: Call, name: str) -> Ways:
        """Returns Gram matrices and forming, for a weight that meets several positions."""
        if name != self.weights[0] or self.operands(call)[0].shape[1] == 1:
            return NO_WAYS
        forms = {"product": lambda call: self.materialize(call, name)}
        norms = {
            "gram": lambda call: gram_norms(*self.operands(call)),
            "symmetric": lambda call: gram_norms(*self.operands(call), halves=True),
            "product": lambda call: formed_norms(*self.operands(call)),
        }
        return Ways(forms, norms)

    def merge(self, calls: Sequence[Call]) -> Call | None:
        """Returns the calls in a row: their positions follow each other."""
        operands = [self.operands(call) for call in calls]
        if len({(a.shape[2], g.shape[2]) for a, g in operands}) > 1:
            return None  # a bias of several layers
        a, g = (torch.cat(parts, dim=1) for parts in zip(*operands))
        arguments = {**calls[0].arguments, self.samples[0]: a}
        return replace(calls[0], arguments=arguments, g=g)

    def spread(self, call: Call, name: str) -> Tensor:
        """Returns sum_t ||a_t|| ||g_t||."""
        return spread(*self.operands(call))

    def operands(self, call: Call) -> tuple[Tensor, Tensor]:
        """Returns input [B, T, d] and output gradient [B, T, p]."""
        return positions(call[self.samples[0]]), positions(call.g)


@register(F.linear)
class Linear(Affine):
    """y = a W^T + b with W [p, d]."""

    weights = ("weight", "bias")
    samples = ("input",)
    transposed = False

    def accepts(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the weight is a matrix and the bias a vector that is not broadcast."""
        weight, bias = arguments["weight"], arguments["bias"]
        return weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns [B, ..., p] for an input [B, ..., d]."""
        return F.linear(input, weight, bias)


@register(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
class Matmul(Affine):
    """y = a W with W [d, p]."""

    weights = ("other",)
    samples = ("input",)
    transposed = True

    def accepts(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the weight is the right factor, and a matrix."""
        return arguments["other"].dim() == 2

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """Returns [B, ..., p] for an input [B, ..., d]."""
        return torch.matmul(input, other)


@register(torch.addmm, torch.Tensor.addmm)
class Addmm(Affine):
    """y = b + a W with W [d, p], as in GPT-2's Conv1D."""

    weights = ("mat2", "input")
    samples = ("mat1",)
    transposed = True

    def accepts(self, arguments: Mapping[str, Any]) -> bool:
        """Whether it is an affine map: a vector b and no other factors."""
        if arguments["beta"] != 1 or arguments["alpha"] != 1 or arguments["mat2"].dim() != 2:
            return False
        return arguments["input"].shape == arguments["mat2"].shape[1:]

    def forward(
        self, input: Tensor, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        """Returns [B, n, p] for an input [B, n, d]."""
        rows = mat1.flatten(0, 1)
        return torch.addmm(input, rows, mat2).unflatten(0, mat1.shape[:2])


@register(torch.bilinear)
class Bilinear(Rule):
    """y = a^T W c + b with W [p, d1, d2]."""

    weights = ("weight", "bias")
    samples = ("input1", "input2")

    def forward(
        self, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Returns [B, ..., p] for inputs [B, ..., d1] and [B, ..., d2]."""
        return torch.bilinear(input1, input2, weight, bias)

    def materialize(self, call: Call, name: str) -> Tensor:
        """Returns sum_t g_it (x) a_it (x) c_it [B, p, d1, d2], or sum_t g_it [B, p]."""
        g = positions(call.g)
        if name == "bias":
            return g.sum(1)
        a, c = positions(call["input1"]), positions(call["input2"])
        return torch.einsum("btp,bti,btj->bpij", g, a, c)


def positions(x: Tensor) -> Tensor:
    """Returns [B, ..., d] as [B, T, d]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
