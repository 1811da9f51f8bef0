"""A clip norm that follows a quantile of the gradient norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dpsgd.clipping.base import Clipping, shrinking

_LEAST, _MOST = 1e-12, 1e12


@dataclass(frozen=True)
class AdaptiveQuantile(Clipping):
    """Moves C towards a quantile of the norms (Andrew et al. 2021, arXiv:1905.03871).

    Beside the sum, each step releases how many samples were not clipped: each adds +1/2 or -1/2 to
    a count, scaled to +-count_share C, a further coordinate of the same noised vector. With noise
    of multiplier sigma on the pair, C moves by exp(-learning_rate (share not clipped - quantile)).

    Guarantee: sum and count together move by at most C sqrt(1 + count_share^2), which is what the
    noise is scaled to: sigma is the multiplier of the pair, and what is learned costs nothing more.
    The count's own noise has standard deviation sigma sqrt(1 + s^2) / (2 s) for s = count_share,
    5 sigma for 0.1.

    Attributes:
        max_grad_norm: The clip norm to start from.
        quantile: The share of samples that should not be clipped, in (0, 1).
        learning_rate: Of log C.
        count_share: Weight of the count against the sum, > 0.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_share: float = 0.1

    def __post_init__(self) -> None:
        """Raises ValueError for senseless numbers."""
        super().__post_init__()
        if self.schedule is not None:
            raise ValueError("Expected no clipping.schedule for adaptive clipping, which has none.")
        if not 0 < self.quantile < 1:
            raise ValueError(f"Expected 0 < quantile < 1, got {self.quantile}.")
        for name in ("learning_rate", "count_share"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Expected a finite {name} > 0, got {value}.")

    @property
    def guarantee(self) -> str:
        """What the policy guarantees, in a sentence."""
        return (
            f"each sample's gradient is shrunk to L2 norm C, which follows the {self.quantile:g} "
            "quantile through a noised count"
        )

    @property
    def sensitivity(self) -> float:
        """C sqrt(1 + count_share^2), for the sum and the count together."""
        return self.max_grad_norm * math.sqrt(1 + self.count_share**2)

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Returns one group of all names."""
        return [list(names)]

    def __call__(self, norms: Tensor) -> Tensor:
        """Returns min(1, C / norms)."""
        return shrinking(norms, self.max_grad_norm)

    def statistic(self, norms: Tensor, counted: Tensor) -> Tensor:
        """Returns the scaled count [1] of samples whose norm is at most C."""
        inside = (norms[:, 0] <= self.max_grad_norm).to(norms.dtype)  # not where it is not finite
        return (self._unit * (inside - 0.5) * counted.to(norms.dtype)).sum()[None]

    def learned(self, statistic: Tensor, expected_batch_size: float) -> AdaptiveQuantile:
        """Returns the policy with C moved by the noised count of a step."""
        share = float(statistic[0]) / self._unit / expected_batch_size + 0.5
        moved = self.max_grad_norm * math.exp(-self.learning_rate * (share - self.quantile))
        return replace(self, max_grad_norm=min(max(moved, _LEAST), _MOST))

    @property
    def _unit(self) -> float:
        """What one sample more in the count adds."""
        return 2 * self.count_share * self.max_grad_norm
