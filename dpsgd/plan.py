"""The privacy plan: sampling, noise and accounting of a run in one frozen object."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from dpsgd import accounting
from dpsgd.accounting import AccountantName, Adjacency


@dataclass(frozen=True)
class PrivacyPlan:
    """num_steps releases, each a Gaussian mechanism on a Poisson sample.

    Attributes:
        sample_rate: Probability that a record joins a step.
        expected_batch_size: sample_rate times the declared public size; the divisor of every sum.
        num_steps: Number of releases.
        noise_multiplier: noise_std / max_grad_norm.
        delta: The delta of the (epsilon, delta) guarantee.
        adjacency: What neighbouring data sets differ in.
        accountant: Which accountant computes epsilon.
    """

    sample_rate: float
    expected_batch_size: float
    num_steps: int
    noise_multiplier: float
    delta: float
    adjacency: Adjacency = "add_remove"
    accountant: AccountantName = "pld"

    def __post_init__(self) -> None:
        """Raises ValueError for a plan that protects nothing or makes no sense."""
        if not (isinstance(self.num_steps, int) and self.num_steps >= 1):
            raise ValueError(f"Expected num_steps >= 1, a whole number, got {self.num_steps}.")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError(
                f"Expected a finite noise_multiplier > 0, got {self.noise_multiplier}. Without "
                "noise there is no privacy."
            )
        if self.sample_rate == 0 or self.expected_batch_size <= 0:
            raise ValueError("Expected sample_rate > 0 and expected_batch_size > 0.")
        public_size = self.expected_batch_size / self.sample_rate
        if self.delta * public_size >= 1:
            raise ValueError(
                f"Expected delta < 1 / public size = {1 / public_size:.3g}, got {self.delta}: a "
                "mechanism that publishes a random record would pass for private."
            )
        if math.isinf(self.epsilon_bound()):
            raise ValueError(
                f"Expected a plan with a finite epsilon, but noise_multiplier="
                f"{self.noise_multiplier} at delta={self.delta} gives an infinite one. Raise "
                "the noise."
            )

    @classmethod
    def make(
        cls,
        *,
        sample_rate: float,
        expected_batch_size: float,
        num_steps: int,
        delta: float,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        adjacency: Adjacency = "add_remove",
        accountant: AccountantName = "pld",
    ) -> PrivacyPlan:
        """Returns the plan for a noise multiplier, or for a target epsilon, which it never exceeds.

        Raises:
            ValueError: If not exactly one of target_epsilon and noise_multiplier is given, or as
                `dpsgd.accounting.calibrate_noise_multiplier` does.
        """
        if (target_epsilon is None) == (noise_multiplier is None):
            raise ValueError(
                "Expected either target_epsilon or noise_multiplier, got "
                f"{'neither' if target_epsilon is None else 'both'}."
            )
        if noise_multiplier is None:
            assert target_epsilon is not None
            noise_multiplier = accounting.calibrate_noise_multiplier(
                target_epsilon=target_epsilon,
                sample_rate=sample_rate,
                num_steps=num_steps,
                delta=delta,
                accountant=accountant,
                adjacency=adjacency,
            )
        return cls(
            sample_rate,
            expected_batch_size,
            num_steps,
            noise_multiplier,
            delta,
            adjacency,
            accountant,
        )

    def epsilon_bound(self) -> float:
        """Returns the epsilon of the whole plan."""
        return accounting.epsilon(
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier,
            num_steps=self.num_steps,
            delta=self.delta,
            accountant=self.accountant,
            adjacency=self.adjacency,
        )

    def epsilon(self, step: int) -> float:
        """Returns an upper bound on the epsilon spent after so many steps, tight at the last."""
        return self._curve(step)

    @cached_property
    def _curve(self) -> accounting.Curve:
        return accounting.curve(
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier,
            num_steps=self.num_steps,
            delta=self.delta,
            accountant=self.accountant,
            adjacency=self.adjacency,
        )


def steps_for(epochs: float, sample_rate: float) -> int:
    """Returns the number of steps after which a record has joined `epochs` times on average.

    Rounded up, so that no fraction of an epoch is lost.

    Raises:
        ValueError: If epochs is not positive.
    """
    if not (math.isfinite(epochs) and epochs > 0):
        raise ValueError(f"Expected a finite number of epochs > 0, got {epochs}.")
    return math.ceil(epochs / sample_rate - 1e-9)
