"""Statistics of releases that hold nothing but noise: is it normal, full, and new each time?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from scipy import stats
from torch import Tensor

_MOST_COORDINATES = 20_000
_MOST_RELEASES = 100


def looked_at(tensor: Tensor) -> Tensor:
    """Returns the coordinates of a tensor that are tested: all, or of many the first and last."""
    values = tensor.detach().flatten()
    if len(values) > _MOST_COORDINATES:
        half = _MOST_COORDINATES // 2
        values = torch.cat([values[:half], values[-half:]])
    return values.cpu().double()


def noise_p_values(parameters: Sequence[Tensor]) -> dict[str, float]:
    """Returns p-values of independent N(0, 1) noise, by what was tested.

    `spread`: chi-square of all coordinates. `parameters`: chi-square of each parameter alone.
    `shape`: Kolmogorov-Smirnov. `releases`, `tensors`: the correlation of any two releases, and of
    the beginnings of any two parameters; that of independent normal vectors of n coordinates has a
    square of law Beta(1/2, (n - 1) / 2). Of many p-values the least counts, times their number.

    Args:
        parameters: Coordinates [R, n] of each parameter in R releases, divided by the claimed
            standard deviation.
    """
    every = torch.cat(list(parameters), 1)
    releases = every[:_MOST_RELEASES]
    return {
        "spread": _spread(every),
        "parameters": _least([_spread(each) for each in parameters]),
        "shape": float(stats.kstest(every.flatten().numpy(), "norm").pvalue),
        "releases": _least([_related(a, b) for a, b in combinations(releases, 2)]),
        "tensors": _least([_begin_alike(a, b) for a, b in combinations(parameters, 2)]),
    }


def _spread(values: Tensor) -> float:
    law, total = stats.chi2(values.numel()), float(values.square().sum())
    return float(2 * min(law.cdf(total), law.sf(total)))


def _begin_alike(a: Tensor, b: Tensor) -> float:
    shared = min(a.shape[1], b.shape[1])
    return _related(a[:, :shared].flatten(), b[:, :shared].flatten())


def _related(a: Tensor, b: Tensor) -> float:
    """The p-value of the correlation of two vectors; 1 where they are too short to tell."""
    if len(a) < 2 or not (a.any() and b.any()):
        return 1.0
    square = float((a @ b) ** 2 / (a.square().sum() * b.square().sum()))
    return float(stats.beta.sf(min(square, 1.0), 0.5, (len(a) - 1) / 2))


def _least(p_values: Sequence[float]) -> float:
    return min(1.0, min(p_values, default=1.0) * len(p_values))
