"""Elementwise functions with parameters. Sums and products need no rule: see the ghost engine."""

from __future__ import annotations

import torch
from torch import Tensor

from dpsgd.rules.registry import Call, Rule, register


@register(torch.prelu)
class Prelu(Rule):
    """y = max(a, 0) + w min(a, 0), one slope or one per channel."""

    weights = ("weight",)
    samples = ("input",)

    def forward(self, input: Tensor, weight: Tensor) -> Tensor:
        """Returns [B, n, channels, ...] for an input of that shape, or any with one slope."""
        if weight.numel() == 1:
            return torch.prelu(input, weight)
        return torch.prelu(input.flatten(0, 1), weight).unflatten(0, input.shape[:2])

    def materialize(self, call: Call, name: str) -> Tensor:
        """Returns the sum of g_i * min(a_i, 0) over everything but the slopes, [B, slopes]."""
        slopes = call.g * call["input"].clamp(max=0)
        if call["weight"].numel() == 1:
            return slopes[:, None].flatten(1).sum(1).view(-1, *call["weight"].shape)
        return slopes.flatten(3).sum((1, 3)) if slopes.dim() > 3 else slopes.sum(1)
