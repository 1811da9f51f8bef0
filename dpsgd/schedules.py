"""Numbers that change at given steps."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Schedule:
    """A positive factor that is constant between given steps, so that composition is exact.

    Attributes:
        factors: The factor from each step on, counted from 0: {0: 1.0, 30: 0.8}.

    Raises:
        ValueError: If step 0 has no factor, a step is no whole number >= 0, or a factor is not
            positive and finite.
    """

    factors: Mapping[int, float]

    def __post_init__(self) -> None:
        if not isinstance(self.factors, Mapping):
            raise ValueError(
                f"Expected a schedule as {{step: factor}}, such as {{0: 1.0, 30: 0.5}}, got "
                f"{self.factors!r}."
            )
        steps = list(self.factors)
        if not all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in steps):
            raise ValueError(f"Expected a schedule of whole steps >= 0, got steps {steps}.")
        if 0 not in steps:
            raise ValueError(f"Expected a schedule that starts at step 0, got steps {steps}.")
        for step, factor in self.factors.items():
            number = isinstance(factor, int | float) and not isinstance(factor, bool)
            if not (number and math.isfinite(factor) and factor > 0):
                raise ValueError(f"Expected a factor > 0 from step {step} on, got {factor!r}.")
        ordered = {step: float(self.factors[step]) for step in sorted(steps)}
        object.__setattr__(self, "factors", ordered)

    def __hash__(self) -> int:
        return hash(tuple(self.factors.items()))

    def __call__(self, step: int) -> float:
        """Returns the factor at a step."""
        starts = list(self.factors)
        return self.factors[starts[bisect_right(starts, step) - 1]]

    def runs(self, num_steps: int) -> list[tuple[float, int]]:
        """Returns the factors of the first num_steps steps, each with how long it lasts."""
        starts = list(self.factors)
        ends = [min(end, num_steps) for end in [*starts[1:], num_steps]]
        return [
            (self.factors[start], end - start)
            for start, end in zip(starts, ends, strict=True)
            if end > start
        ]

    def split(
        self, runs: Sequence[tuple[float, int]], start: int = 0
    ) -> Iterator[tuple[float, float, int]]:
        """Yields (factor, value, count) of runs of a value, cut where the factor changes.

        Args:
            runs: Values in the order of the steps, each with the number of steps it lasts.
            start: The step of the first of them.
        """
        step, changes = start, list(self.factors)
        for value, count in runs:
            end = step + count
            while step < end:
                place = bisect_right(changes, step)
                until = end if place == len(changes) else min(end, changes[place])
                yield self(step), value, until - step
                step = until

    def total(self, num_steps: int) -> float:
        """Returns the sum of the factors of the first num_steps steps."""
        return sum(factor * count for factor, count in self.runs(num_steps))

    def steps_for(self, total: float) -> int:
        """Returns the least number of steps whose factors add up to at least a total >= 0."""
        starts = list(self.factors)
        for start, end in zip(starts, [*starts[1:], math.inf], strict=True):
            within = self.factors[start] * (end - start)
            if total <= within + _ROUNDING:
                return start + max(0, math.ceil(total / self.factors[start] - _ROUNDING))
            total -= within
        raise AssertionError("the last factor lasts for ever")

    def extremes(self, num_steps: int) -> tuple[float, float]:
        """Returns the least and the largest factor of the first num_steps steps."""
        factors = [factor for factor, _ in self.runs(num_steps)]
        return min(factors), max(factors)


CONSTANT = Schedule({0: 1.0})
