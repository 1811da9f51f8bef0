"""Spent epsilon against the steps taken, computed at a few points."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

_POINTS = 20


class Curve:
    """Spent epsilon against steps: exact at the computed steps, the next one's value in between.

    Between two points it over-states, never under-states, what has been spent.

    Args:
        exact: Epsilon as a function of the steps, not falling.
        num_steps: The last step.
    """

    def __init__(self, exact: Callable[[int], float], num_steps: int) -> None:
        every = max(1, -(-num_steps // _POINTS))
        self.steps = sorted({*range(every, num_steps, every), num_steps})
        self.epsilons = [exact(step) for step in self.steps]

    def __call__(self, step: int) -> float:
        """Returns an upper bound on the epsilon spent after so many steps.

        Raises:
            ValueError: If the curve does not reach that far.
        """
        if step == 0:
            return 0.0
        if step > self.steps[-1]:
            raise ValueError(f"Expected at most {self.steps[-1]} steps, got {step}.")
        return self.epsilons[bisect_left(self.steps, step)]
