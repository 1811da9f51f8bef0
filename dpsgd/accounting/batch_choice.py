"""Steps against noise: what each batch size costs within a compute budget, before any training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dpsgd.accounting.calibration import check_target, noise_guess, solve_noise
from dpsgd.accounting.releases import AccountantName, Adjacency, poisson_releases
from dpsgd.accounting.spending import LOSS_INTERVAL, epsilon_of

_SIZES = 12
_LEAST_STEPS = 10
_NARROWEST = 4.0
_LEAST_RATIO = 1.3
_GRID_SHARE = 0.02
_WIDEST_GRID = 1e-3
_NOISE_AT_THE_KNEE = 1.0
_SHARE_AT_THE_KNEE = 0.7
_MOST_STEPS = 100_000
LOSS = 0.1
"""By how much the signal to noise of the recommended batch may fall behind the best one's."""


@dataclass(frozen=True)
class BatchChoice:
    """One way to spend a compute budget: a batch size, its steps, and the noise that they need.

    Attributes:
        expected_batch_size: B, expected number of records of a step.
        sample_rate: q = B / public size.
        num_steps: T, as many as the compute budget allows.
        noise_multiplier: sigma, calibrated to the target epsilon.
    """

    expected_batch_size: float
    sample_rate: float
    num_steps: int
    noise_multiplier: float

    @property
    def noise_of_one_update(self) -> float:
        """Standard deviation of the noise of each coordinate of an update, in clip norms."""
        return self.noise_multiplier / self.expected_batch_size

    @property
    def noise_of_their_mean(self) -> float:
        """The same of the mean of all updates: what is left when the noise has averaged out."""
        return self.noise_of_one_update / math.sqrt(self.num_steps)

    @property
    def signal_to_noise(self) -> float:
        """Q / sigma sqrt(T / 2), whose inverse is the total amount of noise of a training.

        Sander et al. (2023), arXiv:2210.03403.
        """
        return self.sample_rate / self.noise_multiplier * math.sqrt(self.num_steps / 2)


def batch_choices(
    *,
    public_size: int,
    epochs: float,
    target_epsilon: float,
    delta: float,
    accountant: AccountantName = "pld",
    adjacency: Adjacency = "add_remove",
    max_batch_size: float | None = None,
) -> tuple[BatchChoice, ...]:
    """Returns some twelve batch sizes with the steps and the noise that each of them needs.

    All of them process the same expected number of records and spend the same epsilon, by Poisson
    sampling. The sizes grow geometrically, up to the largest one that leaves ten steps; they begin
    where the noise multiplier is about 1 or, if that is larger, at a quarter of the largest.

    PLD counts on a coarser grid than a plan does, for speed: its noise multipliers are up to 0.3 %
    larger than a plan's own calibration, never too small.

    Args:
        public_size: The declared number of records.
        epochs: The compute budget in expected passes over the data, B T / public_size.
        target_epsilon: The epsilon of each choice, never exceeded.
        delta: Of the guarantee, below 1 / public_size.
        accountant: As for `epsilon`.
        adjacency: As for `epsilon`.
        max_batch_size: The largest expected batch that is feasible, by default the whole data.

    Raises:
        ValueError: If a value is out of range, or the budget is below ten steps of one record.
    """
    check_target(target_epsilon, delta, accountant, adjacency)
    largest = _largest(public_size, epochs, max_batch_size)
    if delta * public_size >= 1:
        raise ValueError(f"Expected delta < 1 / public size = {1 / public_size:.3g}, got {delta}.")

    def choice(size: float, guess: float | None = None) -> BatchChoice:
        rate, steps = size / public_size, max(1, round(epochs * public_size / size))
        interval = _interval(target_epsilon, steps)

        def spent(noise: float) -> float:
            releases = poisson_releases(rate, [(noise, steps)])
            return epsilon_of(releases, delta, accountant, adjacency, interval)

        begin = guess or noise_guess(rate * math.sqrt(steps), target_epsilon, delta)
        return BatchChoice(size, rate, steps, solve_noise(spent, target_epsilon, begin))

    found = [choice(largest)]
    for size in _smaller(found[0], public_size, epochs):
        found.append(choice(size, _extrapolated(found, size)))
    return tuple(reversed(found))


def recommended(choices: Sequence[BatchChoice]) -> BatchChoice:
    """Returns the smallest batch whose signal to noise is within 10 % of the best one's.

    Beyond this knee a larger batch gains little and takes fewer steps; below it the noise grows
    faster than the steps make up for.

    Raises:
        ValueError: If there is no choice.
    """
    if not choices:
        raise ValueError("Expected at least one choice, got none.")
    best = max(choice.signal_to_noise for choice in choices)
    good = [choice for choice in choices if choice.signal_to_noise >= (1 - LOSS) * best]
    return min(good, key=lambda choice: choice.expected_batch_size)


def _largest(public_size: int, epochs: float, max_batch_size: float | None) -> float:
    if not public_size >= 1:
        raise ValueError(f"Expected public_size >= 1, got {public_size}.")
    if not (math.isfinite(epochs) and epochs > 0):
        raise ValueError(f"Expected a finite number of epochs > 0, got {epochs}.")
    if max_batch_size is not None and not (math.isfinite(max_batch_size) and max_batch_size >= 1):
        raise ValueError(f"Expected max_batch_size >= 1, got {max_batch_size}.")
    budget = math.floor(epochs * public_size / _LEAST_STEPS)
    if budget < 1:
        raise ValueError(
            f"Expected a budget of at least {_LEAST_STEPS} steps of one record, got epochs={epochs}"
            f" of {public_size} records. Raise epochs."
        )
    return min(budget, public_size, public_size if max_batch_size is None else max_batch_size)


def _smaller(top: BatchChoice, public_size: int, epochs: float) -> list[float]:
    """Sizes below the largest, falling, down to where the noise multiplier is about 1.

    With T = epochs / q, signal to noise is sqrt(q epochs / 2) / sigma.
    """
    largest = top.expected_batch_size
    ratio = _SHARE_AT_THE_KNEE * top.signal_to_noise * _NOISE_AT_THE_KNEE
    knee = max(2 * ratio**2 / epochs, epochs / _MOST_STEPS) * public_size
    least = max(1.0, min(knee, largest / _NARROWEST))
    count = min(_SIZES - 1, math.ceil(math.log(largest / least) / math.log(_LEAST_RATIO)))
    sizes = [_plain(largest * (least / largest) ** (n / count)) for n in range(1, count + 1)]
    return [after for before, after in pairwise([largest, *sizes]) if after < before]


def _interval(target_epsilon: float, steps: int) -> float:
    """Width of the grid of privacy losses whose rounding is small beside the target."""
    wide = _GRID_SHARE * target_epsilon / math.sqrt(steps)
    return max(LOSS_INTERVAL, min(_WIDEST_GRID, wide))


def _plain(size: float) -> float:
    """A size to two digits, as people type it."""
    digits = max(0, math.floor(math.log10(size)) - 1)
    return float(round(size / 10**digits) * 10**digits)


def _extrapolated(found: Sequence[BatchChoice], size: float) -> float:
    """The noise multiplier of the next size, on the line through the last two, in logarithms."""
    last = found[-1]
    slope = 0.5  # where the signal to noise does not change
    if len(found) > 1:
        before = found[-2]
        slope = math.log(last.noise_multiplier / before.noise_multiplier) / math.log(
            last.expected_batch_size / before.expected_batch_size
        )
    return last.noise_multiplier * (size / last.expected_batch_size) ** slope
