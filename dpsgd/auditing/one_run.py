"""The one-run audit (T6): many canaries, one training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dpsgd import rng
from dpsgd.auditing.bounds import one_run_lower_bound
from dpsgd.auditing.subject import Subject

_MOST_VALUES = 5 * 10**7
_LEAST = 10


@dataclass(frozen=True)
class OneRun:
    """What one run with many canaries shows. A report, never a gate: it is a weak test.

    Attributes:
        canaries: How many there were, each in or out by a fair coin. Where a unit can only be
            replaced, the coin chooses between two units.
        steps: Steps of the run.
        claimed: Epsilon of the run at the plan's delta.
        epsilon: The lower bound.
    """

    canaries: int
    steps: int
    claimed: float
    epsilon: float


def audit_one_run(
    subject: Subject, *, canaries: int, steps: int, confidence: float
) -> OneRun | None:
    """Trains once on a random half of many canaries and guesses which (arXiv:2305.08846).

    The attacker sees every release and knows each canary's clipped gradient. The score of a canary
    is its share in the sum of all releases, by least squares with a penalty that suits the noise:
    the projection on its gradient, less what the other canaries have in common with it.

    Args:
        subject: What is audited.
        canaries: How many; fewer where their gradients would not fit in memory.
        steps: Steps of the run, at most the plan's.
        confidence: Of the bound.

    Returns:
        The result; None where fewer than ten canaries fit in memory.

    Raises:
        ValueError: If fewer than ten canaries are asked for, or confidence is out of range.
    """
    if canaries < _LEAST:
        raise ValueError(f"Expected audit.canaries >= {_LEAST}, got {canaries}.")
    canaries = min(canaries, _MOST_VALUES // subject.coordinates)
    if canaries < _LEAST:
        return None
    plan = replace(subject.plan, num_steps=min(steps, subject.plan.num_steps))
    made = subject.units(2 * canaries if plan.adjacency == "replace_one" else canaries)
    units, others = made[:canaries], made[canaries:]
    chosen = rng.uniforms(rng.fresh_key(), 0, canaries) > 0.5
    noise = subject.make_noise(rng.fresh_key())
    places = torch.arange(canaries)
    rows = torch.where(chosen, places, places + canaries) if len(others) else places[chosen]
    trainer = subject.trainer(made[rows], plan, noise, rng.fresh_key())
    gradients = subject.contributions(units, plan.clipping.at(0))
    replaced = subject.contributions(others, plan.clipping.at(0))
    gradients = gradients - replaced if len(others) else gradients
    projected, variance = torch.zeros(canaries, dtype=torch.float64), 0.0
    for step, (clipping, released) in enumerate(subject.releases(trainer)):
        projected += gradients @ released
        variance += (plan.noise_at(step) * clipping.sensitivity) ** 2
    drawn = plan.epochs  # how often a canary joins, on average
    likeness = gradients @ gradients.T
    penalty = 4 * variance / drawn**2  # a coin's own variance is 1/4
    centred = projected / drawn - gradients @ replaced.sum(0) - likeness.sum(1) / 2
    scores = torch.linalg.solve(likeness + penalty * torch.eye(canaries).double(), centred)
    found = one_run_lower_bound(scores.tolist(), chosen.tolist(), plan.target_delta, confidence)
    return OneRun(canaries, plan.num_steps, plan.epsilon(), found)
