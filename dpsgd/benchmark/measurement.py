"""What was measured of one system, and the statistics of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A confidence interval.

    Attributes:
        low: Lower end.
        high: Upper end.
        coverage: Probability that such an interval covers the true value.
    """

    low: float
    high: float
    coverage: float


@dataclass(frozen=True)
class Memory:
    """Peak memory of a step in a fresh process, over what the process held before its first step.

    Attributes:
        peak_mib: Growth in MiB while steps ran, the first one and its one-time checks left out.
        first_step_mib: Growth in MiB in the first step, with one-time checks and compilation.
        method: What was read.
    """

    peak_mib: float
    first_step_mib: float
    method: str


@dataclass(frozen=True)
class Measurement:
    """One row of the benchmark.

    Attributes:
        name: Name of the system.
        seconds: Raw times of whole steps in seconds, in the order of measurement.
        memory: Peak memory, None if it was not measured.
        page_faults: Pages of memory provided during each of these steps; none where unknown.
        refusal: Why the system did not run, None if it did.
        note: What a reader of the figures must know.
    """

    name: str
    seconds: tuple[float, ...] = ()
    memory: Memory | None = None
    page_faults: tuple[int, ...] = ()
    refusal: str | None = None
    note: str = ""

    @property
    def median(self) -> float | None:
        """Median time of a step in seconds, None without times."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def interval(self) -> Interval | None:
        """Confidence interval of the median in seconds, None without times."""
        return median_interval(self.seconds) if self.seconds else None

    def ratio(self, baseline: Measurement) -> float | None:
        """Returns this median over the baseline's, None if either is missing."""
        if self.median is None or baseline.median is None:
            return None
        return self.median / baseline.median

    def as_dict(self, baseline: Measurement) -> dict[str, Any]:
        """Returns everything, raw times included, as plain data for JSON."""
        return {
            "name": self.name,
            "seconds": list(self.seconds),
            "median_seconds": self.median,
            "median_interval": None if self.interval is None else self.interval._asdict(),
            "ratio": self.ratio(baseline),
            "memory": None if self.memory is None else vars(self.memory),
            "page_faults": statistics.median(self.page_faults) if self.page_faults else None,
            "refusal": self.refusal,
            "note": self.note,
        }


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Returns a distribution-free confidence interval of the median, from two order statistics.

    [x_(k), x_(n+1-k)] covers the median with probability 1 - 2 P(Binomial(n, 1/2) < k), whatever
    continuous distribution the n independent values have. The largest k that keeps the confidence
    is taken; fewer than six values cannot reach 95 % and give their range, with its true coverage.

    Args:
        values: At least one number.
        confidence: The coverage that is aimed at.
    """
    ordered, n = sorted(values), len(values)
    rank = max((k for k in range(1, (n + 1) // 2 + 1) if _coverage(n, k) >= confidence), default=1)
    return Interval(ordered[rank - 1], ordered[n - rank], _coverage(n, rank))


def _coverage(n: int, k: int) -> float:
    return max(0.0, 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n)
