"""How far two results are apart, and how much of it rounding explains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpsgd.engines import Batch, LossFn
from dpsgd.engines.narrowest import Narrowest


def relative_gap(actual: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Returns max |actual - expected| / max |expected|, infinite where only one is finite.

    The divisor is at least a hundredth of `scale`: a gradient that is zero but for rounding, beside
    others that are not, has no relative accuracy.
    """
    actual, expected = actual.double().cpu(), expected.double().cpu()
    if not torch.equal(torch.isfinite(actual), torch.isfinite(expected)):
        return float("inf")
    finite = torch.isfinite(expected)
    if not finite.any():
        return 0.0
    gap = (actual - expected)[finite].abs().max()
    least = max(1e-12, scale / 100 if scale < float("inf") else 0.0)
    return float(gap / expected[finite].abs().max().clamp(min=least)) if gap > 1e-12 else 0.0


def tolerance(dtype: torch.dtype) -> float:
    """Returns the relative difference that rounding explains: 1e-9, 1e-3, or 0.1 for bfloat16."""
    return {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 0.1)


def rounding_of(model: nn.Module, loss_fn: LossFn, batch: Batch) -> float:
    """Returns the relative difference that rounding explains in what the forward pass computes.

    Parameters in float32 do not tell: the pass may be in bfloat16 (autocast).
    """
    with Narrowest() as seen, torch.no_grad():
        loss_fn(model, batch)
    return tolerance(min(seen.dtype, next(model.parameters()).dtype, key=_bits))


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits
