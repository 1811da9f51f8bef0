"""The privacy plan: sampling, clipping, noise and accounting of a run in one frozen object."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from dpsgd import accounting
from dpsgd.accounting import AccountantName, Adjacency, Curve, Releases, TradeOff
from dpsgd.accounting.calibration import noise_guess, solve_noise
from dpsgd.accounting.releases import check_delta, check_theorem
from dpsgd.clipping import Clipping
from dpsgd.engines import Engine
from dpsgd.noise import Gaussian
from dpsgd.parallel import Parallel
from dpsgd.private_step import PrivateStep
from dpsgd.sampling import Sampler
from dpsgd.schedules import CONSTANT, Schedule

_MOST_NOISE = 1000.0


@dataclass(frozen=True)
class PrivacyPlan:
    """num_steps releases: sampled, clipped, noised and accounted for by the same figures.

    Sampler, private step, accountant and ledger all take their figures from here, so they cannot
    disagree. Nothing is derived from the data.

    Attributes:
        sampler: Draws the units of each step; it decides what the accountant counts.
        clipping: The policy of the first step, with the bound that it guarantees.
        num_steps: Number of releases, the budget.
        noise_multiplier: noise_std / sensitivity of the clipping policy, under either adjacency.
        target_delta: The delta of the (epsilon, delta) guarantee.
        adjacency: What neighbouring data sets differ in.
        accountant: Which accountant computes epsilon.
        noise_schedule: Factors of the noise multiplier by step.

    Raises:
        ValueError: If the plan protects nothing, makes no sense, or no theorem covers the
            combination of sampler, adjacency and accountant.
    """

    sampler: Sampler
    clipping: Clipping
    num_steps: int
    noise_multiplier: float
    target_delta: float
    adjacency: Adjacency = "add_remove"
    accountant: AccountantName = "pld"
    noise_schedule: Schedule = CONSTANT

    def __post_init__(self) -> None:
        """Raises ValueError for an unsound plan."""
        for part, kind in ((self.sampler, Sampler), (self.clipping, Clipping)):
            if not isinstance(part, kind):
                raise ValueError(f"Expected a {kind.__name__}, got {type(part).__name__}.")
        steps = self.num_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"Expected num_steps >= 1, a whole number, got {steps}.")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError(
                f"Expected a finite noise_multiplier > 0, got {self.noise_multiplier}. Without "
                "noise there is no privacy."
            )
        if self.noise_multiplier * max(self.noise_schedule.factors.values()) > _MOST_NOISE:
            raise ValueError(
                f"Expected noise_multiplier <= {_MOST_NOISE:g}, got {self.noise_multiplier:g}: so "
                "much noise leaves nothing to learn. Take fewer steps, or a larger epsilon."
            )
        _check_covered(self.sampler, self.adjacency, self.accountant)
        size = self.sampler.public_size
        if self.sampler.expected_batch_size is None or size is None:
            raise ValueError("Expected a declared public_size of the data, got none.")
        check_delta(self.target_delta)
        if self.target_delta * size >= 1:
            raise ValueError(
                f"Expected delta < 1 / public size = {1 / size:.3g}, got {self.target_delta}: a "
                f"mechanism that publishes a random {self.sampler.unit} would pass for private."
            )
        if math.isinf(self.epsilon()):
            raise ValueError(
                "Expected a plan with a finite epsilon, but noise_multiplier="
                f"{self.noise_multiplier} at delta={self.target_delta} gives an infinite one. "
                "Raise the noise."
            )

    @classmethod
    def make(
        cls,
        sampler: Sampler,
        clipping: Clipping,
        *,
        num_steps: int,
        target_delta: float,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        adjacency: Adjacency = "add_remove",
        accountant: AccountantName = "pld",
        noise_schedule: Schedule = CONSTANT,
    ) -> PrivacyPlan:
        """Returns the plan for a noise multiplier, or for a target epsilon, which it never exceeds.

        Raises:
            ValueError: If not exactly one of target_epsilon and noise_multiplier is given, the
                target cannot be reached, or as the constructor does.
        """
        if (target_epsilon is None) == (noise_multiplier is None):
            raise ValueError(
                "Expected either target_epsilon or noise_multiplier, got "
                f"{'neither' if target_epsilon is None else 'both'}."
            )

        def plan(multiplier: float) -> PrivacyPlan:
            return cls(
                sampler,
                clipping,
                num_steps,
                multiplier,
                target_delta,
                adjacency,
                accountant,
                noise_schedule,
            )

        if noise_multiplier is None:
            assert target_epsilon is not None
            plan(_probe(noise_schedule))  # whatever is wrong with the rest is said first
            noise_multiplier = _calibrated(plan, target_epsilon, noise_schedule)
        return plan(noise_multiplier)

    @property
    def sample_rate(self) -> float:
        """Expected share of the units that join a step, before the sampler's factors."""
        return self.sampler.rate

    @property
    def expected_batch_size(self) -> float:
        """The public divisor of every sum, before the sampler's factors."""
        assert self.sampler.expected_batch_size is not None
        return self.sampler.expected_batch_size

    def expected_batch_size_at(self, step: int) -> float:
        """Returns the public divisor of a step's sum."""
        return self.expected_batch_size * self.sampler.factors(step)

    @property
    def rates(self) -> tuple[float, float]:
        """The least and the largest sample rate of a step."""
        least, largest = self.sampler.factors.extremes(self.num_steps)
        return self.sample_rate * least, self.sample_rate * largest

    @property
    def batch_sizes(self) -> tuple[float, float]:
        """The least and the largest expected batch size of a step."""
        least, largest = self.sampler.factors.extremes(self.num_steps)
        return self.expected_batch_size * least, self.expected_batch_size * largest

    @property
    def epochs(self) -> float:
        """How often a unit joins a step, on average."""
        return self.sample_rate * self.sampler.factors.total(self.num_steps)

    @property
    def movement(self) -> float:
        """By how many clip norms the change of one unit can move a release (T1), 1 or 2."""
        return self.sampler.theorems[self.adjacency, self.accountant]

    def noise_at(self, step: int) -> float:
        """Returns the noise multiplier of a step."""
        return self.noise_multiplier * self.noise_schedule(step)

    def releases(self, steps: int | None = None) -> Releases:
        """Returns what the first steps release (all by default), as events for an accountant."""
        count = self.num_steps if steps is None else steps
        runs = self.noise_schedule.runs(count)
        return self.sampler.releases([(self.noise_multiplier * f, n) for f, n in runs])

    def event(self, steps: int | None = None) -> Any:
        """Returns what the first steps release (all by default) as a dp-accounting DpEvent."""
        return accounting.as_event(self.releases(steps))

    def epsilon(self, steps: int | None = None, accountant: AccountantName | None = None) -> float:
        """Returns the epsilon that the first steps (all by default) spend at the plan's delta.

        Args:
            steps: Number of steps.
            accountant: Another accountant than the plan's, to check it against.
        """
        return accounting.epsilon_of(
            self.releases(steps), self.target_delta, accountant or self.accountant, self.adjacency
        )

    def delta(self, epsilon: float, steps: int | None = None) -> float:
        """Returns the delta at which the first steps (all by default) spend this epsilon."""
        found = accounting.deltas_of(
            self.releases(steps), [epsilon], self.accountant, self.adjacency
        )
        return float(found[0])

    def spent(self, step: int) -> float:
        """Returns an upper bound on the epsilon spent after so many steps, tight at the last.

        It is computed once at some twenty steps; in between the next of these counts.
        """
        return self.curve(step)

    def tradeoff(self, steps: int | None = None) -> TradeOff:
        """Returns the least errors of an attacker after the first steps (all by default)."""
        return accounting.tradeoff_of(self.releases(steps), self.accountant, self.adjacency)

    def mu(self, steps: int | None = None) -> float:
        """Returns the Gaussian-DP mu for attacks with error rates of at least the plan's delta."""
        return accounting.mu_of(
            self.releases(steps), self.target_delta, self.accountant, self.adjacency
        )

    def true_positive_rate(self, false_positive_rate: float, steps: int | None = None) -> float:
        """Returns the most power of an attack at a false positive rate."""
        return self.tradeoff(steps).true_positive_rate(false_positive_rate)

    def private_step(
        self,
        engine: Engine,
        optimizer: torch.optim.Optimizer,
        noise: Gaussian,
        parallel: Parallel | None = None,
    ) -> PrivateStep:
        """Returns a private step with the figures of this plan, which ends with its budget."""
        return PrivateStep(
            engine,
            optimizer,
            clipping=self.clipping,
            noise=noise,
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=self.expected_batch_size,
            noise_schedule=self.noise_schedule,
            batch_schedule=self.sampler.factors,
            num_steps=self.num_steps,
            parallel=parallel,
        )

    def describe(self) -> dict[str, Any]:
        """Returns the plan as plain values, for the ledger."""
        return {
            "sampling": self.sampler.describe(),
            "unit": self.sampler.unit,
            "num_steps": self.num_steps,
            "noise_multiplier": self.noise_multiplier,
            "clipping": type(self.clipping).__name__,
            "max_grad_norm": self.clipping.max_grad_norm,
            "delta": self.target_delta,
            "adjacency": self.adjacency,
            "accountant": self.accountant,
        }

    @cached_property
    def curve(self) -> Curve:
        """Spent epsilon against steps, computed at some twenty of them."""
        return Curve(self.epsilon, self.num_steps)


def steps_for(epochs: float, sample_rate: float, schedule: Schedule = CONSTANT) -> int:
    """Returns the number of steps after which a record has joined `epochs` times on average.

    Rounded up, so that no fraction of an epoch is lost.

    Raises:
        ValueError: If epochs is not positive.
    """
    if not (math.isfinite(epochs) and epochs > 0):
        raise ValueError(f"Expected a finite number of epochs > 0, got {epochs}.")
    return schedule.steps_for(epochs / sample_rate)


def _probe(noise_schedule: Schedule) -> float:
    """The largest noise multiplier that a plan may have."""
    return _MOST_NOISE / max(noise_schedule.factors.values())


def _calibrated(
    plan: Callable[[float], PrivacyPlan], target_epsilon: float, noise_schedule: Schedule
) -> float:
    """The noise multiplier of a target, within 0.1 % and never above."""
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ValueError(f"Expected a finite target_epsilon > 0, got {target_epsilon}.")
    model = plan(_probe(noise_schedule))

    def spent(multiplier: float) -> float:
        runs = [(multiplier * f, n) for f, n in model.noise_schedule.runs(model.num_steps)]
        return accounting.epsilon_of(
            model.sampler.releases(runs), model.target_delta, model.accountant, model.adjacency
        )

    scale = model.sample_rate * math.sqrt(model.num_steps) * model.movement
    guess = noise_guess(scale, target_epsilon, model.target_delta)
    return solve_noise(spent, target_epsilon, guess)


def _check_covered(sampler: Sampler, adjacency: str, accountant: str) -> None:
    check_theorem(accountant, adjacency)
    if (adjacency, accountant) not in sampler.theorems:
        known = " or ".join(f"adjacency={a} with accountant={b}" for a, b in sampler.theorems)
        raise ValueError(
            f"Expected a combination that a theorem covers, got {type(sampler).__name__} sampling "
            f"with adjacency={adjacency} and accountant={accountant}. It is covered for {known}."
        )
