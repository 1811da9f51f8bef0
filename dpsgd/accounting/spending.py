"""Epsilon and delta of releases, computed by Google's dp-accounting."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from dpsgd.accounting.releases import (
    AccountantName,
    Adjacency,
    Releases,
    check_delta,
    check_noise,
    check_rate,
    check_steps,
    check_theorem,
    noise_of,
    poisson_releases,
)

_MIN_NOISE = 1e-3
LOSS_INTERVAL = 1e-4
"""Least width of the grid of privacy losses: dp-accounting's default."""
_GRID = 1e6
_TAIL = 9.0  # standard deviations
_COARSE_ORDERS = (*range(2, 33), 48, 64, 128, 256)


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
    check_rate(sample_rate)
    check_noise(noise_multiplier)
    check_steps(num_steps)
    releases = poisson_releases(sample_rate, [(noise_multiplier, int(num_steps))])
    return epsilon_of(releases, delta, accountant, adjacency)


def epsilon_of(
    releases: Releases,
    delta: float,
    accountant: AccountantName = "pld",
    adjacency: Adjacency = "add_remove",
    interval: float = LOSS_INTERVAL,
) -> float:
    """Returns the epsilon of any releases at delta.

    Args:
        releases: What is released, in any order.
        delta: In (0, 1).
        accountant: As for `epsilon`.
        adjacency: As for `epsilon`.
        interval: Least width of the grid of privacy losses (PLD). A wider one is faster and
            over-states epsilon, never the other way round.

    Raises:
        ValueError: If delta is out of range, or the pair of accountant and adjacency unsound.
    """
    check_theorem(accountant, adjacency)
    check_delta(delta)
    if not releases:
        return 0.0
    if min(noise_of(event)[1] for event, _ in releases) < _MIN_NOISE:
        return math.inf  # an upper bound; the libraries overflow
    return _epsilon(releases, delta, accountant, adjacency, interval)


def deltas_of(
    releases: Releases,
    epsilons: Sequence[float] | np.ndarray,
    accountant: AccountantName = "pld",
    adjacency: Adjacency = "add_remove",
) -> np.ndarray:
    """Returns the delta of any releases at each epsilon >= 0.

    Args:
        releases: What is released, in any order.
        epsilons: Values of epsilon.
        accountant: As for `epsilon`.
        adjacency: As for `epsilon`.

    Raises:
        ValueError: If an epsilon is negative, or the pair of accountant and adjacency unsound.
    """
    check_theorem(accountant, adjacency)
    asked = np.asarray(epsilons, dtype=np.float64)
    if not (asked >= 0).all():
        raise ValueError(f"Expected epsilon >= 0, got {asked.min()}.")
    if not releases:
        return np.zeros(len(asked))
    if min(noise_of(event)[1] for event, _ in releases) < _MIN_NOISE:
        return np.ones(len(asked))
    with _without_warnings():
        if accountant == "rdp":
            composed = _rdp(releases, adjacency)
            return np.array([composed.get_delta(float(value)) for value in asked])
        pld = _pld(releases, adjacency)
        return np.clip([pld.get_delta_for_epsilon(float(value)) for value in asked], 0, 1)


def random_stopping_epsilon(
    releases: Releases, delta: float, mean: float, shape: float, adjacency: Adjacency = "add_remove"
) -> float:
    """Returns the epsilon of releasing the best of a random number of runs, by RDP.

    The number of runs follows a truncated negative binomial distribution that no data influences
    (Papernot & Steinke 2022, arXiv:2110.03620).

    Args:
        releases: Of one run; every run has the same.
        delta: In (0, 1).
        mean: Mean number of runs.
        shape: Of the distribution: 1 geometric, 0 logarithmic.
        adjacency: `add_remove`; there is no RDP for `replace_one`.

    Raises:
        ValueError: If a value is out of range.
    """
    import dp_accounting
    from dp_accounting.dp_event import RepeatAndSelectDpEvent

    from dpsgd.accounting.releases import as_event

    check_theorem("rdp", adjacency)
    check_delta(delta)
    if not (math.isfinite(mean) and mean >= 1 and math.isfinite(shape) and shape >= 0):
        raise ValueError(f"Expected mean >= 1 and shape >= 0, got {mean} and {shape}.")
    with _without_warnings():
        accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=_relation(adjacency))
        accountant.compose(RepeatAndSelectDpEvent(as_event(releases), mean, shape))
        return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=512)
def _epsilon(
    releases: Releases,
    delta: float,
    accountant: AccountantName,
    adjacency: Adjacency,
    interval: float,
) -> float:
    with _without_warnings():
        if accountant == "rdp":
            return float(_rdp(releases, adjacency).get_epsilon(delta))
        return float(_pld(releases, adjacency, interval).get_epsilon_for_delta(delta))


@lru_cache(maxsize=8)
def _pld(releases: Releases, adjacency: Adjacency, least: float = LOSS_INTERVAL) -> Any:
    interval = max(least, _interval(releases))
    parts = [_composed(event, count, interval, adjacency) for event, count in releases]
    total = parts[0]
    for part in parts[1:]:
        total = total.compose(part)
    return total


def _composed(event: Any, count: int, interval: float, adjacency: Adjacency) -> Any:
    import dp_accounting

    if isinstance(event, dp_accounting.GaussianDpEvent):  # so many are one with less noise
        together = dp_accounting.GaussianDpEvent(event.noise_multiplier / math.sqrt(count))
        return _pld_of_one(together, interval, adjacency)
    one = _pld_of_one(event, interval, adjacency)
    return one if count == 1 else one.self_compose(count)


@lru_cache(maxsize=32)
def _pld_of_one(event: Any, interval: float, adjacency: Adjacency) -> Any:
    """The privacy loss distribution of one event: computed once, composed as often as needed."""
    from dp_accounting import TruncatedSubsampledGaussianDpEvent
    from dp_accounting.pld import privacy_loss_distribution as library

    if isinstance(event, TruncatedSubsampledGaussianDpEvent):
        return library.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=event.dataset_size,
            sampling_probability=event.sampling_probability,
            truncated_batch_size=event.truncated_batch_size,
            noise_multiplier=event.noise_multiplier,
            value_discretization_interval=interval,
            neighboring_relation=_relation(adjacency),
        )
    rate, noise = noise_of(event)
    return library.from_gaussian_mechanism(
        standard_deviation=noise,
        value_discretization_interval=interval,
        sampling_prob=rate,
        neighboring_relation=_relation(adjacency),
    )


def _rdp(releases: Releases, adjacency: Adjacency, orders: Sequence[int] | None = None) -> Any:
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant(orders, neighboring_relation=_relation(adjacency))
    for event, count in releases:
        accountant.compose(event, count)
    return accountant


def _relation(adjacency: Adjacency) -> Any:
    from dp_accounting import NeighboringRelation

    return {
        "add_remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace_one": NeighboringRelation.REPLACE_ONE,
    }[adjacency]


def _interval(releases: Releases) -> float:
    """Width of the grid of privacy losses: the library's 1e-4, wider where losses run past 100.

    Memory and time stay bounded for plans with hardly any noise. The estimate stays pessimistic.
    """
    known = [(*noise_of(event), count) for event, count in releases]
    of_one_step = [0.5 / sigma**2 + _TAIL / sigma for _, sigma, _ in known]
    of_all = sum(loss * count for loss, (_, _, count) in zip(of_one_step, known, strict=True))
    if of_all <= _GRID * LOSS_INTERVAL:
        return LOSS_INTERVAL
    alike = tuple(
        (poisson_releases(rate, [(sigma, 1)])[0][0], count) for rate, sigma, count in known
    )
    composed = _rdp(alike, "add_remove", _COARSE_ORDERS)
    reach = min(composed.get_epsilon(1e-15), of_all)
    return max(LOSS_INTERVAL, max(of_one_step) / _GRID, reach / _GRID)


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
