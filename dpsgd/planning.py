"""The privacy plan of a configuration; no data is touched for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dpsgd.accounting import epsilon_of
from dpsgd.accounting.calibration import solve_rate, solve_steps
from dpsgd.clipping import Clipping
from dpsgd.plan import PrivacyPlan, steps_for
from dpsgd.sampling import Poisson, Sampler
from dpsgd.schedules import CONSTANT, Schedule


def privacy_plan(
    config: DictConfig, sampler: Sampler, clipping: Clipping, solve: str | None = None
) -> PrivacyPlan:
    """Returns the plan that a configuration describes.

    Args:
        config: A resolved configuration.
        sampler: Its sampler.
        clipping: Its clipping policy.
        solve: `num_steps` or `sample_rate`, to be as large as target_epsilon allows at the noise
            multiplier; None takes both as they are.

    Raises:
        ValueError: If the plan is unsound, or the configuration says too much or too little.
    """
    if not isinstance(sampler, Sampler):
        raise ValueError(f"Expected sampler to be a Sampler, got {type(sampler).__name__}.")
    num_steps, epochs = config.trainer.num_steps, config.trainer.epochs
    if (num_steps is None) == (epochs is None):
        got = "neither" if num_steps is None else "both"
        raise ValueError(
            f"Expected either trainer.num_steps or trainer.epochs, got {got}. Set one of them, "
            "trainer.num_steps=60 for example."
        )
    privacy = config.privacy
    if solve not in (None, "num_steps", "sample_rate"):
        raise ValueError(f"Expected account.solve to be num_steps or sample_rate, got '{solve}'.")
    if solve is not None and privacy.noise_multiplier is None:
        raise ValueError(f"Expected privacy.noise_multiplier to solve for {solve}, got null.")
    if num_steps is None:
        num_steps = steps_for(epochs, sampler.rate, sampler.factors)
    schedule = privacy.noise_schedule
    given = PrivacyPlan.make(
        sampler,
        clipping,
        num_steps=num_steps,
        target_delta=privacy.target_delta,
        target_epsilon=privacy.target_epsilon if solve is None else None,
        noise_multiplier=privacy.noise_multiplier,
        adjacency=privacy.adjacency,
        accountant=config.accountant.name,
        noise_schedule=CONSTANT if schedule is None else Schedule(_plain(schedule)),
    )
    return given if solve is None else _solved(given, solve, privacy.target_epsilon)


def _plain(setting: Any) -> Any:
    return OmegaConf.to_container(setting) if OmegaConf.is_config(setting) else setting


def _solved(plan: PrivacyPlan, solve: str, target_epsilon: float | None) -> PrivacyPlan:
    """The plan with as many steps, or as high a rate, as the target allows."""
    if target_epsilon is None or not target_epsilon > 0:
        raise ValueError(
            f"Expected privacy.target_epsilon > 0 to solve for {solve}, got {target_epsilon}."
        )

    def spent(sampler: Sampler, num_steps: int) -> float:
        runs = plan.noise_schedule.runs(num_steps)
        releases = sampler.releases([(plan.noise_multiplier * f, n) for f, n in runs])
        return epsilon_of(releases, plan.target_delta, plan.accountant, plan.adjacency)

    def at_rate(rate: float) -> Sampler:
        return replace(plan.sampler, sample_rate=rate, expected_batch_size=None)

    if solve == "num_steps":
        steps = solve_steps(lambda number: spent(plan.sampler, number), target_epsilon)
        return replace(plan, num_steps=steps)
    check_rate_is_free(plan.sampler, "solve for sample_rate")
    rate = solve_rate(lambda rate: spent(at_rate(rate), plan.num_steps), target_epsilon)
    return replace(plan, sampler=at_rate(rate))


def check_rate_is_free(sampler: Sampler, purpose: str) -> None:
    """Raises unless the rate of a sampler can be anything, and is all that its releases depend on.

    Args:
        sampler: The sampler.
        purpose: What its rate is varied for, in words.
    """
    if type(sampler).releases is not Poisson.releases:
        raise ValueError(
            f"Expected sampler=poisson or user_poisson to {purpose}, got {type(sampler).__name__}: "
            "its releases do not follow from its rate alone."
        )
    if sampler.factors != CONSTANT:
        raise ValueError(
            f"Expected one rate for all steps to {purpose}, got a schedule. Leave out "
            "sampler.schedule."
        )
