"""What an attempt at a run may spend, given what the attempts before it have spent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpsgd.accounting import Curve, Releases, epsilon_of
from dpsgd.ledger import AttemptCharges
from dpsgd.plan import PrivacyPlan

_SLACK = 1e-9


class Budget:
    """The epsilon of a run's attempts together; it never exceeds that of the plan.

    An attempt that repeats steps of another one pays for them again, and so has to end earlier.

    Args:
        plan: The privacy plan.
        others: What the other attempts have charged.
        first: The step that this attempt began with.
    """

    def __init__(self, plan: PrivacyPlan, others: Sequence[AttemptCharges], first: int) -> None:
        self._plan = plan
        self._first = first if others else 0
        self._others = [
            release
            for attempt in others
            for release in plan.sampler.releases(attempt.noise, attempt.start)
        ]

    def epsilon(self, step: int) -> float:
        """Returns the epsilon of everything, once this attempt has come to a step."""
        plan = self._plan
        noise = [(plan.noise_at(number), 1) for number in range(self._first, step)]
        counts: dict[Any, int] = {}
        for event, count in (*self._others, *plan.sampler.releases(noise, self._first)):
            counts[event] = counts.get(event, 0) + count
        total: Releases = tuple(counts.items())
        return epsilon_of(total, plan.target_delta, plan.accountant, plan.adjacency)

    def last_step(self) -> int:
        """Returns the step after which this attempt has to end."""
        plan = self._plan
        if not self._others:
            return plan.num_steps
        limit = plan.epsilon() * (1 + _SLACK)
        low, high = self._first, plan.num_steps  # the last one that fits is in [low, high]
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.epsilon(middle) <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def curve(self) -> Curve:
        """Returns the epsilon spent against this attempt's steps."""
        if not self._others:
            return self._plan.curve
        begun = self.epsilon(self._first)

        def spent(step: int) -> float:  # what came before was spent step by step as well
            return (
                self.epsilon(step) if step > self._first else min(begun, self._plan.epsilon(step))
            )

        return Curve(spent, max(1, self.last_step()))
