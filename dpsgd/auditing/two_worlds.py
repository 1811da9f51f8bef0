"""The two-world audit (T5): can an attacker tell whether a canary was in the data?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpsgd import rng
from dpsgd.accounting import gaussian_epsilon
from dpsgd.auditing.bounds import (
    Point,
    epsilon_lower_bound,
    measured_points,
    mu_lower_bound,
    violations,
)
from dpsgd.auditing.subject import Subject, Units, few_threads
from dpsgd.clipping import Clipping
from dpsgd.plan import PrivacyPlan

_COMMON = 4
_LEAST_RUNS = 50


@dataclass(frozen=True)
class TwoWorlds:
    """Claimed and measured privacy of the first steps of a plan.

    Attributes:
        steps: How many steps were audited.
        runs: Runs per world.
        asked: Runs per world that were asked for; fewer were done where time was up.
        claimed: Epsilon of these steps at the plan's delta.
        delta: The plan's delta.
        epsilon: Lower bound without assumptions, limited by the number of runs.
        epsilon_gaussian: Lower bound for a mechanism with a Gaussian trade-off curve.
        mu: The Gaussian-DP mu that the latter follows from.
        strength: By how many clip norms the canary moves a sum; below the plan's movement the
            audit is valid, but weaker.
        points: The attack's errors.
        violated: The points that the claim rules out.
    """

    steps: int
    runs: int
    asked: int
    claimed: float
    delta: float
    epsilon: float
    epsilon_gaussian: float
    mu: float
    strength: float
    points: list[Point]
    violated: list[Point]


def check_runs(runs: int, steps: int) -> None:
    """Raises ValueError for too few runs to tell anything, or no step."""
    if runs < _LEAST_RUNS or steps < 1:
        raise ValueError(
            f"Expected audit.runs >= {_LEAST_RUNS} and audit.steps >= 1, got {runs} and {steps}."
        )


def audit_two_worlds(
    subject: Subject,
    *,
    runs: int,
    steps: int,
    confidence: float,
    seconds: float,
    progress: Callable[[int], None] = lambda done: None,
) -> TwoWorlds:
    """Trains again and again with and without a canary, and attacks every release.

    The attacker sees the weights after each step, knows and chooses all records and the weights
    before each step (Nasr et al. 2023, arXiv:2302.07956), and takes the likelihood ratio along the
    canary's gradient. Ctrl-C ends the runs; those done are evaluated. No score is seen before the
    runs end, so their number cannot depend on one.

    Args:
        subject: What is audited.
        runs: Runs per world.
        steps: Steps of a run, at most the plan's.
        confidence: Of the bounds together.
        seconds: After which no further pair of runs is begun.
        progress: Called with the number of pairs done.

    Raises:
        ValueError: If a number is out of range, or time is up before 50 pairs.
        KeyboardInterrupt: By Ctrl-C before 50 pairs.
    """
    check_runs(runs, steps)
    steps = min(steps, subject.plan.num_steps)
    if not seconds > 0:
        raise ValueError(f"Expected audit.minutes > 0, got {seconds / 60:g}.")
    plan = replace(subject.plan, num_steps=steps)
    attack = _Attack(subject, plan)
    with few_threads(subject):
        scores = _scores(attack, runs, seconds, progress)
    if len(scores[0]) < _LEAST_RUNS:
        raise ValueError(
            f"Expected time for at least {_LEAST_RUNS} runs per world, had time for "
            f"{len(scores[0])}. Raise audit.minutes, or lower audit.steps."
        )
    points = measured_points(*scores, confidence)
    mu = mu_lower_bound(points)
    return TwoWorlds(
        steps=steps,
        runs=len(scores[0]),
        asked=runs,
        claimed=plan.epsilon(),
        delta=plan.target_delta,
        epsilon=epsilon_lower_bound(points, plan.target_delta),
        epsilon_gaussian=gaussian_epsilon(mu, plan.target_delta),
        mu=mu,
        strength=attack.strength,
        points=points,
        violated=violations(points, plan.tradeoff()),
    )


def _scores(
    attack: _Attack, runs: int, seconds: float, progress: Callable[[int], None]
) -> tuple[list[float], list[float]]:
    """Scores of pairs of runs, one in each world, until time is up or Ctrl-C."""
    found: tuple[list[float], list[float]] = ([], [])
    end = time.monotonic() + seconds
    try:
        while len(found[0]) < runs and time.monotonic() < end:
            pair = attack(0), attack(1)
            for scores, score in zip(found, pair):
                scores.append(score)
            progress(len(found[0]))
    except KeyboardInterrupt:
        if len(found[0]) < _LEAST_RUNS:
            raise
    return found


class _Attack:
    """One run in a world, and the likelihood ratio of its releases.

    With q the sampling rate, a_1 what the canary adds along the direction in which the worlds
    differ, a_0 what it replaces (0 if it is added), s the projection of a release less what the
    other records add on average, and sigma the noise's standard deviation, a step's share is
    log(1 - q + q e^((s a_1 - a_1^2 / 2) / sigma^2)) less the same with a_0.
    """

    def __init__(self, subject: Subject, plan: PrivacyPlan) -> None:
        self._subject, self._plan = subject, plan
        self._common = subject.units(_COMMON)
        if plan.adjacency == "replace_one":
            self._differing = subject.canaries()
        else:
            self._differing = subject.units(0), subject.canary()
        self._worlds = [self._common + unit for unit in self._differing]
        clipping = plan.clipping.at(0)
        self._look(clipping)
        bound = clipping.full_weight * clipping.max_grad_norm
        self.strength = abs(self._added[1] - self._added[0]) / bound

    def __call__(self, world: int) -> float:
        """Returns the score of a new run in world 0 or 1."""
        noise = self._subject.make_noise(rng.fresh_key())
        trainer = self._subject.trainer(self._worlds[world], self._plan, noise, rng.fresh_key())
        score = 0.0
        for step, (clipping, released) in enumerate(self._subject.releases(trainer)):
            if clipping != self._clipping:
                self._look(clipping)
            std = self._plan.noise_at(step) * clipping.sensitivity
            score += self._log_ratio(float(self._direction @ released), std, step)
        return score

    def _look(self, clipping: Clipping) -> None:
        """Computes what each unit adds under a clipping policy."""
        common: Tensor = self._subject.contributions(self._common, clipping).sum(0)
        without, with_canary = (self._sum(unit, clipping) for unit in self._differing)
        moved = with_canary - without
        self._direction = moved / max(float(moved.norm()), 1e-300)
        self._added = [float(self._direction @ each) for each in (without, with_canary)]
        self._common_part = float(self._direction @ common)
        self._clipping = clipping

    def _sum(self, units: Units, clipping: Clipping) -> Tensor:
        return self._subject.contributions(units, clipping).sum(0)

    def _log_ratio(self, projected: float, std: float, step: int) -> float:
        q = torch.tensor(self._plan.sampler.rate_at(step), dtype=torch.float64)
        projected -= float(q) * self._common_part
        without, with_canary = (
            torch.logaddexp(torch.log1p(-q), q.log() + (projected * a - a * a / 2) / std**2)
            for a in self._added
        )
        return float(with_canary - without)
