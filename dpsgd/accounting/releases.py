"""What a run releases, as events that dp-accounting knows, and the theorems that cover it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

AccountantName = Literal["pld", "rdp"]
Adjacency = Literal["add_remove", "replace_one"]

Releases: TypeAlias = tuple[tuple[Any, int], ...]
"""Events of dp-accounting, each with the number of times that it happens."""

NoiseRuns: TypeAlias = Sequence[tuple[float, int]]
"""Noise multipliers in the order of the steps, each with the number of steps it lasts."""


def poisson_releases(sample_rate: float, noise: NoiseRuns) -> Releases:
    """Returns the releases of Poisson-sampled Gaussian sums.

    Args:
        sample_rate: q in [0, 1].
        noise: The noise multipliers of the steps.
    """
    if sample_rate == 0:
        return ()
    return tuple((_poisson(sample_rate, sigma), count) for sigma, count in noise if count)


def gaussian_releases(noise: NoiseRuns) -> Releases:
    """Returns the releases of Gaussian sums without amplification by sampling."""
    return poisson_releases(1.0, noise)


def truncated_releases(
    sample_rate: float, max_batch_size: int, public_size: int, noise: NoiseRuns
) -> Releases:
    """Returns the releases of truncated Poisson sampling (arXiv:2508.15089).

    Args:
        sample_rate: q in (0, 1].
        max_batch_size: The most records that a batch keeps.
        public_size: The number of records.
        noise: The noise multipliers of the steps.
    """
    from dp_accounting import TruncatedSubsampledGaussianDpEvent as Event

    return tuple(
        (Event(public_size, sample_rate, max_batch_size, sigma), n) for sigma, n in noise if n
    )


def as_event(releases: Releases) -> Any:
    """Returns the releases as one dp-accounting DpEvent."""
    import dp_accounting

    parts = [dp_accounting.SelfComposedDpEvent(event, count) for event, count in releases]
    return parts[0] if len(parts) == 1 else dp_accounting.ComposedDpEvent(parts)


def noise_of(event: Any) -> tuple[float, float]:
    """Returns (sampling probability, noise multiplier) of an event."""
    import dp_accounting

    if isinstance(event, dp_accounting.PoissonSampledDpEvent):
        return event.sampling_probability, event.event.noise_multiplier
    if isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
        return event.sampling_probability, event.noise_multiplier / 2  # a record may evict another
    return 1.0, event.noise_multiplier


def neighbouring(adjacency: str, unit: str) -> str:
    """Returns what neighbouring data sets differ in, in words."""
    return f"{'add/remove' if adjacency == 'add_remove' else 'replace'} one {unit}"


def check_theorem(accountant: str, adjacency: str) -> None:
    """Raises for an accountant and an adjacency that no theorem joins."""
    if accountant not in ("pld", "rdp"):
        raise ValueError(f"Expected accountant to be pld or rdp, got '{accountant}'.")
    if adjacency not in ("add_remove", "replace_one"):
        raise ValueError(f"Expected adjacency add_remove or replace_one, got '{adjacency}'.")
    if adjacency == "replace_one" and accountant == "rdp":
        raise ValueError(
            "Expected accountant=pld for adjacency=replace_one, got rdp: dp-accounting's RDP "
            "under-reports it."
        )


def check_delta(delta: float) -> None:
    """Raises unless 0 < delta < 1."""
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta < 1, got {delta}.")


def check_rate(sample_rate: float) -> None:
    """Raises unless 0 <= sample_rate <= 1."""
    if not 0 <= sample_rate <= 1:
        raise ValueError(f"Expected 0 <= sample_rate <= 1, got {sample_rate}.")


def check_steps(num_steps: float) -> None:
    """Raises unless num_steps is a whole number >= 0."""
    if not (num_steps >= 0 and math.isfinite(num_steps) and num_steps == int(num_steps)):
        raise ValueError(f"Expected a whole number of steps >= 0, got {num_steps}.")


def check_noise(noise_multiplier: float) -> None:
    """Raises unless noise_multiplier is finite and >= 0."""
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(f"Expected a finite noise_multiplier >= 0, got {noise_multiplier}.")


def _poisson(sample_rate: float, sigma: float) -> Any:
    import dp_accounting

    event = dp_accounting.GaussianDpEvent(sigma)
    return event if sample_rate == 1 else dp_accounting.PoissonSampledDpEvent(sample_rate, event)
