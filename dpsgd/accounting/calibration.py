"""Solving for a noise multiplier, a number of steps or a sample rate; never past the target."""

from __future__ import annotations

import math
from collections.abc import Callable

from dpsgd.accounting.releases import (
    AccountantName,
    Adjacency,
    check_delta,
    check_noise,
    check_rate,
    check_steps,
    check_theorem,
)
from dpsgd.accounting.spending import epsilon

_TOLERANCE = 1e-3
_MAX_NOISE = 1e6
_FLOOR = 0.05
_ROUNDS = 60
_MAX_STEPS = 10**9
_MIN_RATE = 1e-9


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    sample_rate: float,
    num_steps: int,
    delta: float,
    accountant: AccountantName = "pld",
    adjacency: Adjacency = "add_remove",
) -> float:
    """Returns a noise multiplier whose epsilon is within 0.1 % of the target and never above it.

    It is at least 0.05, where the target may not be reached.

    Args:
        target_epsilon: The budget, > 0.
        sample_rate: As for `epsilon`, > 0.
        num_steps: As for `epsilon`, >= 1.
        delta: As for `epsilon`.
        accountant: As for `epsilon`.
        adjacency: As for `epsilon`.

    Raises:
        ValueError: If a value is out of range or no noise multiplier up to a million suffices.
    """
    check_rate(sample_rate)
    check_steps(num_steps)
    check_target(target_epsilon, delta, accountant, adjacency)
    if num_steps == 0 or sample_rate == 0:
        raise ValueError("Expected num_steps >= 1 and sample_rate > 0 to calibrate noise.")

    def spent(noise_multiplier: float) -> float:
        return epsilon(
            sample_rate=sample_rate,
            noise_multiplier=noise_multiplier,
            num_steps=num_steps,
            delta=delta,
            accountant=accountant,
            adjacency=adjacency,
        )

    guess = noise_guess(sample_rate * math.sqrt(num_steps), target_epsilon, delta)
    return solve_noise(spent, target_epsilon, guess)


def calibrate_num_steps(
    *,
    target_epsilon: float,
    sample_rate: float,
    noise_multiplier: float,
    delta: float,
    accountant: AccountantName = "pld",
    adjacency: Adjacency = "add_remove",
) -> int:
    """Returns the largest number of steps whose epsilon is not above the target.

    Args:
        target_epsilon: The budget, > 0.
        sample_rate: As for `epsilon`, > 0.
        noise_multiplier: As for `epsilon`, > 0.
        delta: As for `epsilon`.
        accountant: As for `epsilon`.
        adjacency: As for `epsilon`.

    Raises:
        ValueError: If a value is out of range, a single step is above the target, or 1e9 steps are
            not.
    """
    check_rate(sample_rate)
    check_noise(noise_multiplier)
    check_target(target_epsilon, delta, accountant, adjacency)
    if noise_multiplier == 0 or sample_rate == 0:
        raise ValueError("Expected noise_multiplier > 0 and sample_rate > 0 to find num_steps.")

    def spent(num_steps: int) -> float:
        return epsilon(
            sample_rate=sample_rate,
            noise_multiplier=noise_multiplier,
            num_steps=num_steps,
            delta=delta,
            accountant=accountant,
            adjacency=adjacency,
        )

    return solve_steps(spent, target_epsilon)


def calibrate_sample_rate(
    *,
    target_epsilon: float,
    noise_multiplier: float,
    num_steps: int,
    delta: float,
    accountant: AccountantName = "pld",
    adjacency: Adjacency = "add_remove",
) -> float:
    """Returns a sample rate whose epsilon is within 0.1 % of the target and never above it.

    It is at most 1, where the target may not be reached.

    Args:
        target_epsilon: The budget, > 0.
        noise_multiplier: As for `epsilon`, > 0.
        num_steps: As for `epsilon`, >= 1.
        delta: As for `epsilon`.
        accountant: As for `epsilon`.
        adjacency: As for `epsilon`.

    Raises:
        ValueError: If a value is out of range or no sample rate from 1e-9 on stays below.
    """
    check_noise(noise_multiplier)
    check_steps(num_steps)
    check_target(target_epsilon, delta, accountant, adjacency)
    if noise_multiplier == 0 or num_steps == 0:
        raise ValueError("Expected noise_multiplier > 0 and num_steps >= 1 to find sample_rate.")

    def spent(sample_rate: float) -> float:
        return epsilon(
            sample_rate=sample_rate,
            noise_multiplier=noise_multiplier,
            num_steps=num_steps,
            delta=delta,
            accountant=accountant,
            adjacency=adjacency,
        )

    return solve_rate(spent, target_epsilon)


def noise_guess(scale: float, target: float, delta: float) -> float:
    """Returns a rough noise multiplier for a target, where a search may start.

    Args:
        scale: About sample_rate * sqrt(num_steps).
        target: The budget.
        delta: Of the guarantee.
    """
    return max(scale * math.sqrt(2 * math.log(1 / delta)) / target, 0.3)


def solve_steps(spent: Callable[[int], float], target: float) -> int:
    """Returns the largest number of steps with spent(steps) <= target, by doubling and halving.

    Raises:
        ValueError: If one step is too many, or a billion are not.
    """
    if spent(1) > target:
        raise ValueError(
            f"Expected a target that one step keeps, but one step spends epsilon {spent(1):.4g} > "
            f"{target}. Raise the noise or lower sample_rate."
        )
    low, high = 1, 2
    while spent(high) <= target:
        low, high = high, 2 * high
        if high > _MAX_STEPS:
            raise ValueError(f"Expected a target that {_MAX_STEPS:g} steps reach, got {target}.")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(middle) <= target else (low, middle)
    return low


def solve_rate(spent: Callable[[float], float], target: float) -> float:
    """Returns a sample rate that brings epsilon within 0.1 % of the target, never above; at most 1.

    Raises:
        ValueError: If even the smallest rate is too much.
    """
    if spent(1.0) <= target:
        return 1.0
    if spent(_MIN_RATE) > target:
        raise ValueError(
            f"Expected a reachable target, but sample_rate {_MIN_RATE:g} spends more than epsilon "
            f"{target}. Raise the noise or lower num_steps."
        )
    low, high = math.log(_MIN_RATE), 0.0
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        now = spent(math.exp(middle))
        low, high = (middle, high) if now <= target else (low, middle)
        if target * (1 - _TOLERANCE) <= now <= target:
            break
    return math.exp(low)


def check_target(target_epsilon: float, delta: float, accountant: str, adjacency: str) -> None:
    """Raises unless a target is positive, delta in (0, 1), and accountant and adjacency sound."""
    check_theorem(accountant, adjacency)
    check_delta(delta)
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ValueError(f"Expected a finite target_epsilon > 0, got {target_epsilon}.")


def solve_noise(spent: Callable[[float], float], target: float, guess: float) -> float:
    """Returns a noise multiplier that brings epsilon within 0.1 % of the target, never above.

    Newton steps on log(spent) against log(noise), kept inside a bracket that bisection can halve.

    Args:
        spent: Epsilon as a function of the noise multiplier, falling.
        target: The budget.
        guess: Where the search starts.

    Raises:
        ValueError: If no noise multiplier up to a million suffices.
    """
    aim = target * (1 - _TOLERANCE / 2)
    low, high = 0.0, math.inf
    noise, slope, previous = guess, -1.0, None
    for _ in range(_ROUNDS):
        noise = max(noise, _FLOOR)
        now = spent(noise)
        if noise == _FLOOR and now <= target:  # any noise would do
            return noise
        if target * (1 - _TOLERANCE) <= now <= target:
            return noise
        low, high = (noise, high) if now > target else (low, noise)
        if previous and now != previous[1] and min(now, previous[1]) > 0 and now < math.inf:
            change = math.log(noise / previous[0])
            slope = min(math.log(now / previous[1]) / change, -0.1)
        previous = (noise, now) if 0 < now < math.inf else None
        ratio = now / aim if 0 < now < math.inf else (4.0 if now > 0 else 0.25)
        noise = noise * min(max(ratio, 0.01), 100.0) ** (-1 / slope)
        if not low < noise < high:
            noise = (low + high) / 2 if high < math.inf else 2 * low
        if noise > _MAX_NOISE:
            break
    raise ValueError(
        f"Expected a reachable target, but no noise multiplier up to {_MAX_NOISE:g} brings epsilon "
        f"to {target}. Lower num_steps or sample_rate, or raise the target."
    )
