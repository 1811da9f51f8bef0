"""Lower bounds from attacks: right on known distributions, and rarely above the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from dpsgd.accounting import TradeOff, gaussian_epsilon
from dpsgd.auditing.bounds import (
    Point,
    clopper_pearson_upper,
    epsilon_lower_bound,
    measured_points,
    mu_lower_bound,
    one_run_lower_bound,
    one_run_p_value,
    violations,
)


def gaussian(mu, runs, seed, confidence=0.9):
    generator = np.random.default_rng(seed)
    return measured_points(
        generator.standard_normal(runs), mu + generator.standard_normal(runs), confidence
    )


def curve(mu):
    epsilons = np.linspace(0, 12, 300)
    deltas = stats.norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons) * stats.norm.cdf(
        -mu / 2 - epsilons / mu
    )
    return TradeOff(epsilons, deltas)


def test_clopper_pearson_is_exact():
    for successes, trials in ((0, 20), (3, 20), (19, 20)):
        upper = clopper_pearson_upper(successes, trials, 0.05)
        assert stats.binom.cdf(successes, trials, upper) == pytest.approx(0.05)
    assert clopper_pearson_upper(20, 20, 0.05) == 1.0


@pytest.mark.parametrize("mu", [0.5, 1.5, 3.0])
def test_bounds_come_close_to_the_truth_and_stay_below(mu):
    points = gaussian(mu, 20_000, 1)
    assert 0.85 * mu < mu_lower_bound(points) <= mu
    assert 0 < epsilon_lower_bound(points, 1e-5) <= gaussian_epsilon(mu, 1e-5)
    assert violations(points, curve(mu)) == []


def test_bounds_are_rarely_above_the_truth():
    """At confidence 0.9 no more than a tenth of the audits may be wrong."""
    wrong = 0
    for seed in range(300):
        points = gaussian(1.0, 300, seed)
        wrong += mu_lower_bound(points) > 1.0 or bool(violations(points, curve(1.0)))
    assert wrong <= stats.binom.isf(1e-4, 300, 0.1)


def test_a_claim_of_too_much_privacy_is_violated():
    assert violations(gaussian(2.0, 1000, 0), curve(1.0))
    assert not violations(gaussian(1.0, 1000, 0), curve(1.0))


def test_no_difference_shows_no_epsilon():
    assert mu_lower_bound(gaussian(0.0, 2000, 3)) == 0
    assert epsilon_lower_bound(gaussian(0.0, 2000, 3), 1e-5) == 0


def test_a_perfect_attack_shows_as_much_as_its_runs_allow():
    points = measured_points([0.0] * 1000, [1.0] * 1000, 0.99)
    assert 4 < epsilon_lower_bound(points, 1e-5) < math.log(1000)


def test_delta_lowers_the_bound():
    point = [Point(0.1, 0.1, 0.1, 0.1)]
    assert epsilon_lower_bound(point, 0) == pytest.approx(math.log(9))
    assert epsilon_lower_bound(point, 0.1) == pytest.approx(math.log(8))


@pytest.mark.parametrize(("runs", "confidence"), [(5, 0.9), (100, 0.0), (100, 1.0)])
def test_senseless_audits_are_refused(runs, confidence):
    with pytest.raises(ValueError, match="Expected"):
        measured_points([0.0] * runs, [0.0] * runs, confidence)


def test_the_p_value_of_one_run_is_the_binomial_tail_without_delta():
    rate = math.e / (1 + math.e)
    expected = stats.binom.sf(79, 100, rate)
    assert one_run_p_value(100, 100, 80, 1.0, 0.0) == pytest.approx(expected)
    assert one_run_p_value(100, 100, 80, 1.0, 1e-4) > expected
    assert one_run_p_value(100, 100, 0, 1.0, 1e-4) == 1.0


def test_all_right_guesses_rule_out_a_large_epsilon():
    """All of 100 right at epsilon e has probability (1 + exp(-e))^-100."""
    truth = [True] * 50 + [False] * 50
    scores = [1.0] * 50 + [0.0] * 50
    bound = one_run_lower_bound(scores, truth, 0.0, 0.95)
    strongest = -math.log((0.05 / 8) ** (-1 / 100) - 1)
    assert bound == pytest.approx(strongest, rel=1e-6)
    assert one_run_lower_bound(scores, truth, 1e-3, 0.95) < bound


def test_one_run_is_rarely_above_the_truth():
    """Randomised response of epsilon 1: right with probability e / (1 + e)."""
    generator, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        truth = generator.random(100) < 0.5
        told = truth ^ (generator.random(100) < 1 / (1 + math.e))
        scores = np.where(told, 1.0, -1.0) + 0.1 * generator.standard_normal(100)
        wrong += one_run_lower_bound(scores, truth, 1e-5, 0.9) > 1.0
    assert wrong <= stats.binom.isf(1e-4, 200, 0.1)


def test_guessing_shows_nothing():
    generator = np.random.default_rng(5)
    truth = generator.random(100) < 0.5
    assert one_run_lower_bound(generator.standard_normal(100), truth, 1e-5, 0.99) == 0


def test_no_canary_is_guessed_twice():
    """Of an odd number, one guessed both `in` and `out` would be right for certain."""
    for count in range(2, 40):
        truth = [i % 2 == 0 for i in range(count)]
        assert one_run_lower_bound(range(count), truth, 0.0, 0.99) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: one_run_p_value(10, 11, 5, 1.0, 0.0),
        lambda: one_run_p_value(10, 5, 6, 1.0, 0.0),
        lambda: one_run_lower_bound([1.0], [True], 0.0, 0.9),
        lambda: one_run_lower_bound([1.0, 2.0], [True], 0.0, 0.9),
        lambda: one_run_lower_bound([1.0, 2.0], [True, False], 0.0, 1.0),
    ],
)
def test_senseless_one_run_audits_are_refused(call):
    with pytest.raises(ValueError, match="Expected"):
        call()
