"""What is known of a step's samples. Not covered by the guarantee: never to be published."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dpsgd.private_step import Contribution

_ROUNDING = 1e-6


def sums_of(
    contributions: list[Contribution], full_weight: float
) -> tuple[float, float, float, float]:
    """Returns of the samples that count: number, losses, norms, and how many were clipped."""
    if not contributions:
        return 0.0, 0.0, 0.0, 0.0
    weights = torch.cat([c.weights.max(1).values for c in contributions])
    counted = weights > 0
    losses = torch.cat([c.losses for c in contributions])[counted]
    norms = torch.cat([c.norms.square().sum(1).sqrt() for c in contributions])[counted]
    clipped = weights[counted] < full_weight * (1 - _ROUNDING)
    return (
        float(counted.sum()),
        float(losses.double().sum()),
        float(norms.double().sum()),
        float(clipped.sum()),
    )


def diagnostics(sums: list[float], drawn: int) -> Mapping[str, float]:
    """Returns what `logger.diagnostics` writes of a step: means over its samples.

    Args:
        sums: What `sums_of` returned, added up over all processes.
        drawn: How many units were drawn.
    """
    if not drawn:
        return {"drawn_batch_size": 0.0}
    counted, losses, norms, clipped = sums
    share = 1 / counted if counted else float("nan")
    return {
        "drawn_batch_size": float(drawn),
        "train_loss": losses * share,
        "grad_norm": norms * share,
        "clipped_fraction": clipped * share,
        "not_finite": drawn - counted,
    }
