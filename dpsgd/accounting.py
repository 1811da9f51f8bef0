"""Privacy accounting, all of it by Google's dp-accounting."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

AccountantName = Literal["pld", "rdp"]
Adjacency = Literal["add_remove", "replace_one"]

_TOLERANCE = 1e-3
_MAX_NOISE = 1e6
_MIN_NOISE = 1e-3
_FLOOR = 0.05
_ROUNDS = 60
_CURVE_POINTS = 20
_INTERVAL = 1e-4  # dp-accounting's default
_GRID = 1e6
_TAIL = 9.0  # standard deviations


def epsilon(
    *,
    sample_rate: float,
    noise_multiplier: float,
    num_steps: int,
    delta: float,
    accountant: AccountantName = "pld",
    adjacency: Adjacency = "add_remove",
) -> float:
    """Returns the epsilon that num_steps of Poisson-sampled Gaussian releases spend at delta.

    Args:
        sample_rate: Probability q that a record joins a step, in [0, 1].
        noise_multiplier: noise_std / max_grad_norm, under either adjacency.
        num_steps: Number of releases.
        delta: In (0, 1).
        accountant: `pld` (privacy loss distributions, tight; Koskela et al. 2020, arXiv:1906.03049)
            or `rdp` (Renyi; Mironov et al. 2019, arXiv:1908.10530).
        adjacency: `add_remove` one record, or `replace_one` (PLD only).

    Returns:
        Epsilon: 0 without steps or sampling, infinite without noise.

    Raises:
        ValueError: If a value is out of range, or the pair of accountant and adjacency unsound.
    """
    _check(sample_rate, num_steps, delta, accountant, adjacency)
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(f"Expected a finite noise_multiplier >= 0, got {noise_multiplier}.")
    if num_steps == 0 or sample_rate == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    return _epsilon(sample_rate, noise_multiplier, num_steps, delta, accountant, adjacency)


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
    _check(sample_rate, num_steps, delta, accountant, adjacency)
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ValueError(f"Expected a finite target_epsilon > 0, got {target_epsilon}.")
    if num_steps == 0 or sample_rate == 0:
        raise ValueError("Expected num_steps >= 1 and sample_rate > 0 to calibrate noise.")

    def spent(noise_multiplier: float) -> float:
        return _epsilon(sample_rate, noise_multiplier, num_steps, delta, accountant, adjacency)

    # a Gaussian of total scale q sqrt(T) / sigma: near enough to start from
    guess = sample_rate * math.sqrt(2 * num_steps * math.log(1 / delta)) / target_epsilon
    return _search(spent, target_epsilon, max(guess, 0.3))


def curve(
    *,
    sample_rate: float,
    noise_multiplier: float,
    num_steps: int,
    delta: float,
    accountant: AccountantName = "pld",
    adjacency: Adjacency = "add_remove",
) -> Curve:
    """Returns epsilon as a function of the steps taken, computed once at about twenty points."""
    every = max(1, -(-num_steps // _CURVE_POINTS))
    steps = sorted({*range(every, num_steps, every), num_steps})
    epsilons = [
        epsilon(
            sample_rate=sample_rate,
            noise_multiplier=noise_multiplier,
            num_steps=step,
            delta=delta,
            accountant=accountant,
            adjacency=adjacency,
        )
        for step in steps
    ]
    return Curve(steps, epsilons)


class Curve:
    """Spent epsilon against steps: exact at the computed steps, the next one's value in between.

    Between two points it over-states, never under-states, what has been spent.
    """

    def __init__(self, steps: list[int], epsilons: list[float]) -> None:
        self.steps = steps
        self.epsilons = epsilons

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


def _check(
    sample_rate: float, num_steps: int, delta: float, accountant: str, adjacency: str
) -> None:
    if not 0 <= sample_rate <= 1:
        raise ValueError(f"Expected 0 <= sample_rate <= 1, got {sample_rate}.")
    if not (num_steps >= 0 and num_steps == int(num_steps)):
        raise ValueError(f"Expected a whole number of steps >= 0, got {num_steps}.")
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta < 1, got {delta}.")
    if accountant not in ("pld", "rdp"):
        raise ValueError(f"Expected accountant to be pld or rdp, got '{accountant}'.")
    if adjacency not in ("add_remove", "replace_one"):
        raise ValueError(f"Expected adjacency add_remove or replace_one, got '{adjacency}'.")
    if adjacency == "replace_one" and accountant == "rdp":
        raise ValueError(
            "Expected accountant=pld for adjacency=replace_one, got rdp: dp-accounting's RDP "
            "under-reports it."
        )


@lru_cache(maxsize=512)
def _epsilon(
    sample_rate: float,
    noise_multiplier: float,
    num_steps: int,
    delta: float,
    accountant: AccountantName,
    adjacency: Adjacency,
) -> float:
    if noise_multiplier < _MIN_NOISE:
        return math.inf  # an upper bound; the libraries overflow
    with _without_warnings():
        if accountant == "rdp":
            composed = _rdp(sample_rate, noise_multiplier, num_steps, adjacency)
            return float(composed.get_epsilon(delta))
        interval = _interval(sample_rate, noise_multiplier, num_steps)
        if sample_rate == 1:  # so many Gaussian releases are one with less noise
            noise = noise_multiplier / math.sqrt(num_steps)
            return float(_pld(1.0, noise, interval, adjacency).get_epsilon_for_delta(delta))
        step = _pld(sample_rate, noise_multiplier, interval, adjacency)
        return float(step.self_compose(int(num_steps)).get_epsilon_for_delta(delta))


@lru_cache(maxsize=16)
def _pld(sample_rate: float, noise_multiplier: float, interval: float, adjacency: Adjacency) -> Any:
    """The privacy loss distribution of one step: computed once, composed as often as needed."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=sample_rate,
        neighboring_relation=_relation(adjacency),
    )


def _rdp(
    sample_rate: float,
    noise_multiplier: float,
    num_steps: int,
    adjacency: Adjacency,
    orders: list[int] | None = None,
) -> Any:
    import dp_accounting

    event: Any = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sample_rate < 1:
        event = dp_accounting.PoissonSampledDpEvent(sample_rate, event)
    accountant = dp_accounting.rdp.RdpAccountant(orders, neighboring_relation=_relation(adjacency))
    return accountant.compose(event, int(num_steps))


def _relation(adjacency: Adjacency) -> Any:
    from dp_accounting import NeighboringRelation

    return {
        "add_remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace_one": NeighboringRelation.REPLACE_ONE,
    }[adjacency]


def _interval(sample_rate: float, noise_multiplier: float, num_steps: int) -> float:
    """Width of the grid of privacy losses: the library's 1e-4, wider where losses run past 100.

    Memory and time stay bounded for plans with hardly any noise. The estimate stays pessimistic.
    """
    of_one_step = 0.5 / noise_multiplier**2 + _TAIL / noise_multiplier
    if of_one_step * num_steps <= _GRID * _INTERVAL:
        return _INTERVAL
    orders = [*range(2, 33), 48, 64, 128, 256]
    composed = _rdp(sample_rate, noise_multiplier, num_steps, "add_remove", orders)
    reach = min(composed.get_epsilon(1e-15), of_one_step * num_steps)
    return max(_INTERVAL, of_one_step / _GRID, reach / _GRID)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """dp-accounting warns of every Renyi order it leaves out, which only loosens the bound."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _search(spent: Callable[[float], float], target: float, guess: float) -> float:
    """Solves spent(noise) in [(1 - tolerance) target, target], spent falling in noise.

    Newton steps on log(spent) against log(noise), kept inside a bracket that bisection can halve.
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
