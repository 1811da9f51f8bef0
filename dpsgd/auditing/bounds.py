"""From the successes of an attack to lower bounds on epsilon, each with a confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from dpsgd.accounting import TradeOff

_PILOT = 0.1
_SHARES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
_VISIBLE = 1e300
_GUESSES = 8
_HALVINGS = 60
_MOST = 60.0


@dataclass(frozen=True)
class Point:
    """How an attack with one threshold did.

    Attributes:
        false_positive_rate: Share of the runs without the canary that it accused.
        false_negative_rate: Share of the runs with the canary that it missed.
        false_positive_upper: Upper confidence bound on the former.
        false_negative_upper: Upper confidence bound on the latter.
    """

    false_positive_rate: float
    false_negative_rate: float
    false_positive_upper: float
    false_negative_upper: float


def measured_points(
    without: Sequence[float], with_canary: Sequence[float], confidence: float
) -> list[Point]:
    """Returns the errors of attacks that accuse where a score exceeds a threshold.

    The first tenth of the runs sets the thresholds, the rest is counted. All bounds of all points
    hold together with the given confidence (Clopper & Pearson 1934, and Bonferroni). A score that
    is no number counts as a very large one: an attacker would see it.

    Args:
        without: Scores of independent runs without the canary.
        with_canary: Scores of runs with it.
        confidence: In (0, 1).

    Raises:
        ValueError: If there are fewer than ten runs in a world, or confidence is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"Expected 0 < confidence < 1, got {confidence}.")
    null, other = _visible(without), _visible(with_canary)
    if min(len(null), len(other)) < 10:
        raise ValueError(f"Expected at least 10 runs per world, got {min(len(null), len(other))}.")
    pilots = [math.ceil(_PILOT * len(scores)) for scores in (null, other)]
    pilot = np.concatenate([null[: pilots[0]], other[: pilots[1]]])
    error = (1 - confidence) / (2 * len(_SHARES))
    points = []
    for threshold in np.quantile(pilot, _SHARES):
        accused = int((null[pilots[0] :] > threshold).sum())
        missed = int((other[pilots[1] :] <= threshold).sum())
        runs = len(null) - pilots[0], len(other) - pilots[1]
        points.append(
            Point(
                accused / runs[0],
                missed / runs[1],
                clopper_pearson_upper(accused, runs[0], error),
                clopper_pearson_upper(missed, runs[1], error),
            )
        )
    return points


def _visible(scores: Sequence[float]) -> np.ndarray:
    values = np.nan_to_num(np.asarray(scores, dtype=float), nan=_VISIBLE)
    return values.clip(-_VISIBLE, _VISIBLE)


def clopper_pearson_upper(successes: int, trials: int, error: float) -> float:
    """Returns the rate above which so few successes have a probability of at most `error`.

    Exact, for any number of trials (Clopper & Pearson 1934).

    Args:
        successes: Out of the trials.
        trials: >= 1.
        error: In (0, 1).
    """
    if successes == trials:
        return 1.0
    return float(stats.beta.isf(error, successes + 1, trials - successes))


def epsilon_lower_bound(points: Sequence[Point], delta: float) -> float:
    """Returns the largest epsilon that no (epsilon, delta)-private mechanism can have, >= 0.

    From 1 - FNR <= e^epsilon FPR + delta and its mirror image (Kairouz et al. 2015,
    arXiv:1311.0776).
    """
    found = [0.0]
    for point in points:
        rates = point.false_positive_upper, point.false_negative_upper
        for rate, other in (rates, rates[::-1]):
            if 1 - delta - other > 0:
                found.append(math.log((1 - delta - other) / rate))
    return max(found)


def mu_lower_bound(points: Sequence[Point]) -> float:
    """Returns the largest mu that no mu-Gaussian-DP mechanism can be below, >= 0.

    mu = Phi^-1(1 - FPR) - Phi^-1(FNR) (Nasr et al. 2023, arXiv:2302.07956).
    """
    found = [
        stats.norm.isf(point.false_positive_upper) - stats.norm.ppf(point.false_negative_upper)
        for point in points
    ]
    return max([0.0, *map(float, found)])


def violations(points: Sequence[Point], claimed: TradeOff) -> list[Point]:
    """Returns the points that lie below the claimed trade-off curve with their confidence."""
    return [p for p in points if p.false_negative_upper < claimed(p.false_positive_upper)]


def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Returns a bound on the probability of so many right guesses under (epsilon, delta)-DP.

    Of m canaries, each in or out by a fair coin, an attacker guesses r and is right on at least v:
    with B ~ Binomial(r, e^epsilon / (1 + e^epsilon)), the probability is at most P[B >= v] +
    2 m delta max_i P[v > B >= v - i] / i (Steinke et al. 2023, arXiv:2305.08846, theorem 5.2).

    Args:
        canaries: m.
        guesses: r <= m.
        right: v <= r.
        epsilon: >= 0.
        delta: >= 0.

    Raises:
        ValueError: If not 0 <= right <= guesses <= canaries.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(
            "Expected 0 <= right <= guesses <= canaries, got "
            f"{right}, {guesses} and {canaries}. Guess each canary at most once."
        )
    rate = 1 / (1 + math.exp(-epsilon))
    if right == 0:
        return 1.0
    tail = float(special.bdtrc(right - 1, guesses, rate))  # P[B >= v]
    below = _below(guesses, right, rate)
    excess = float((below / np.arange(1, right + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * excess)


def _below(guesses: int, right: int, rate: float) -> np.ndarray:
    """Returns P[v > B >= v - i] for i = 1..v, B ~ Binomial(guesses, rate) and v = right."""
    k = np.arange(right - 1, -1, -1)
    orders = special.gammaln(guesses + 1) - special.gammaln(k + 1)
    orders = orders - special.gammaln(guesses - k + 1)
    chances = special.xlogy(k, rate) + special.xlog1py(guesses - k, -rate)
    return np.cumsum(np.exp(orders + chances))


def one_run_lower_bound(
    scores: Sequence[float], included: Sequence[bool], delta: float, confidence: float
) -> float:
    """Returns the largest epsilon that a single run with many canaries rules out, >= 0.

    The attacker guesses `in` for the highest scores and `out` for the lowest. Several numbers of
    guesses are tried; the bound holds for all of them together.

    Args:
        scores: One per canary.
        included: Whether it was in the run.
        delta: Of the guarantee.
        confidence: In (0, 1).

    Raises:
        ValueError: If there are fewer than two canaries, or confidence is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"Expected 0 < confidence < 1, got {confidence}.")
    if not len(scores) == len(included) >= 2:
        raise ValueError(
            "Expected a score and a coin for each of at least 2 canaries, got "
            f"{len(scores)} scores and {len(included)} coins."
        )
    order = np.argsort(np.asarray(scores, dtype=float), kind="stable")
    truth = np.asarray(included, dtype=bool)[order]
    count = len(truth)
    sides = sorted({max(1, count * k // (2 * _GUESSES)) for k in range(1, _GUESSES + 1)})
    error = (1 - confidence) / len(sides)
    best = 0.0
    for side in sides:
        right = int(truth[count - side :].sum() + (~truth[:side]).sum())
        best = max(best, _ruled_out(count, 2 * side, right, delta, error))
    return best


def _ruled_out(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """The largest epsilon whose p-value is at most `error`, by halving."""
    if one_run_p_value(canaries, guesses, right, 0.0, delta) > error:
        return 0.0
    low, high = 0.0, _MOST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        rejected = one_run_p_value(canaries, guesses, right, middle, delta) <= error
        low, high = (middle, high) if rejected else (low, middle)
    return low
