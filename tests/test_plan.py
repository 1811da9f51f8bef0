"""The privacy plan and what is computed from it."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from dpsgd import accounting, clipping
from dpsgd.plan import PrivacyPlan
from dpsgd.sampling import Poisson
from dpsgd.schedules import Schedule


def plan(q=1.0, sigma=5.0, steps=25, **options):
    sampler = Poisson(sample_rate=q, public_size=1000)
    return PrivacyPlan(sampler, clipping.Flat(1.0), steps, sigma, 1e-5, **options)


def test_epsilon_and_delta_are_inverse():
    made = plan(q=0.2, sigma=2.0)
    for steps in (1, 10, 25):
        assert made.delta(made.epsilon(steps), steps) == pytest.approx(1e-5, rel=1e-3)


def test_without_sampling_the_trade_off_is_the_gaussian_one():
    """25 releases of sigma 5 are one Gaussian of mu = sqrt(25) / 5 = 1."""
    made = plan()
    for rate in (0.001, 0.01, 0.1, 0.5):
        expected = norm.sf(norm.isf(rate) - 1)
        assert made.true_positive_rate(rate) == pytest.approx(expected, rel=5e-3)
        assert made.true_positive_rate(rate) >= expected * (1 - 1e-6)
    mu = made.mu()
    assert mu == pytest.approx(1.0, rel=5e-3)
    assert mu >= 1 - 1e-6


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_trade_off_is_a_trade_off(accountant):
    curve = plan(q=0.1, sigma=1.0, accountant=accountant).tradeoff()
    rates = np.linspace(0, 1, 101)
    missed = np.array([curve(rate) for rate in rates])
    assert (np.diff(missed) <= 1e-12).all()
    assert (np.diff(missed, 2) >= -1e-9).all(), "convex"
    assert (missed <= 1 - rates + 1e-12).all()
    assert missed[-1] == 0
    with pytest.raises(ValueError, match="false_positive_rate"):
        curve(1.5)


def test_mu_bounds_the_plan_at_delta():
    made = plan(q=0.1, sigma=1.0)
    mu, curve = made.mu(), made.tradeoff()
    assert accounting.gaussian_epsilon(mu, 1e-5) >= made.epsilon() * (1 - 1e-6)
    for rate in np.geomspace(1e-5, 0.5, 50):
        if curve(rate) >= 1e-5:
            assert norm.cdf(norm.isf(rate) - mu) <= curve(rate) + 1e-9


def test_hardly_any_privacy_has_a_large_mu():
    assert plan(sigma=0.2, steps=10).mu() > 10


def test_the_event_is_what_is_accounted():
    import dp_accounting

    made = plan(q=0.1, sigma=1.0, noise_schedule=Schedule({0: 1.0, 10: 2.0}))
    accountant = dp_accounting.pld.PLDAccountant()
    accountant.compose(made.event())
    assert accountant.get_epsilon(1e-5) == pytest.approx(made.epsilon(), rel=1e-6)


def test_a_schedule_is_composed_exactly():
    one = plan(q=0.1, sigma=1.0, noise_schedule=Schedule({0: 1.0, 10: 3.0}))
    assert one.epsilon(10) == plan(q=0.1, sigma=1.0).epsilon(10)
    assert plan(q=0.1, sigma=1.0).epsilon() > one.epsilon() > one.epsilon(10)
    constant = plan(q=0.1, sigma=1.0, noise_schedule=Schedule({0: 1.0, 9: 1.0}))
    assert constant.epsilon() == pytest.approx(plan(q=0.1, sigma=1.0).epsilon(), rel=1e-4)


def test_a_schedule_reaches_a_target():
    made = PrivacyPlan.make(
        Poisson(sample_rate=0.1, public_size=1000),
        clipping.Flat(1.0),
        num_steps=30,
        target_delta=1e-5,
        target_epsilon=2.0,
        noise_schedule=Schedule({0: 2.0, 20: 0.7}),
    )
    assert 2.0 * (1 - 1e-3) <= made.epsilon() <= 2.0
    assert made.noise_at(0) == 2 * made.noise_multiplier
    assert made.noise_at(20) == 0.7 * made.noise_multiplier


@pytest.mark.parametrize(
    "factors", [{}, {1: 1.0}, {0: 0.0}, {0: -1.0}, {0: math.nan}, {0: 1.0, -3: 1.0}, {0.5: 1.0}]
)
def test_senseless_schedules_are_refused(factors):
    with pytest.raises(ValueError, match="Expected a"):
        Schedule(factors)


def test_a_schedule_tells_its_runs():
    schedule = Schedule({0: 1.0, 30: 0.5, 10: 2.0})
    assert [schedule(step) for step in (0, 9, 10, 29, 30, 99)] == [1, 1, 2, 2, 0.5, 0.5]
    assert schedule.runs(35) == [(1.0, 10), (2.0, 20), (0.5, 5)]
    assert schedule.runs(10) == [(1.0, 10)]
    assert schedule.runs(0) == []


def test_a_private_step_has_the_plans_figures():
    import torch

    from dpsgd import engines, losses
    from dpsgd.noise import Gaussian

    model = torch.nn.Linear(2, 2)
    made = plan(q=0.1, noise_schedule=Schedule({0: 1.0, 5: 2.0}))
    step = made.private_step(
        engines.Vmap(model, losses.cross_entropy),
        torch.optim.SGD(model.parameters(), lr=0.1),
        Gaussian(),
    )
    assert step.expected_batch_size == made.expected_batch_size == 100
    assert step.noise_multiplier == made.noise_multiplier
    assert step.noise_schedule == made.noise_schedule
    assert step.clipping == made.clipping


def test_a_step_of_a_plan_ends_with_its_budget():
    import torch

    from dpsgd import engines, losses
    from dpsgd.noise import Gaussian

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = plan(steps=2).private_step(
        engines.Vmap(model, losses.cross_entropy), optimizer, Gaussian()
    )
    batch = torch.randn(3, 2), torch.zeros(3, dtype=torch.int64)
    step(batch)
    step.release()
    before = model.weight.detach().clone()
    for spend in (lambda: step(batch), step.release, lambda: step.accumulate(batch)):
        with pytest.raises(ValueError, match="at most 2 steps"):
            spend()
    assert torch.equal(model.weight, before)


BASE = {"target_epsilon": 2.0, "delta": 1e-5}


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_calibrated_steps_are_the_most_that_the_target_allows(accountant):
    figures = {"sample_rate": 0.1, "noise_multiplier": 2.0}
    steps = accounting.calibrate_num_steps(**BASE, **figures, accountant=accountant)
    spent = [
        accounting.epsilon(**figures, num_steps=n, delta=1e-5, accountant=accountant)
        for n in (steps, steps + 1)
    ]
    assert spent[0] <= 2.0 < spent[1]


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_a_calibrated_rate_is_close_to_the_target_and_never_above(accountant):
    figures = {"noise_multiplier": 2.0, "num_steps": 100}
    rate = accounting.calibrate_sample_rate(**BASE, **figures, accountant=accountant)
    spent = accounting.epsilon(sample_rate=rate, delta=1e-5, accountant=accountant, **figures)
    assert 2.0 * (1 - 1e-3) <= spent <= 2.0


def test_a_rate_of_one_may_fall_short_of_the_target():
    rate = accounting.calibrate_sample_rate(**BASE, noise_multiplier=100.0, num_steps=1)
    assert rate == 1.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: accounting.calibrate_num_steps(**BASE, sample_rate=1, noise_multiplier=0.5),
         "one step"),
        (lambda: accounting.calibrate_num_steps(**BASE, sample_rate=0, noise_multiplier=1),
         "sample_rate > 0"),
        (lambda: accounting.calibrate_sample_rate(**BASE, noise_multiplier=0, num_steps=3),
         "noise_multiplier > 0"),
        (lambda: accounting.calibrate_sample_rate(**BASE, noise_multiplier=0.06, num_steps=10**6),
         "reachable"),
    ],
)  # fmt: skip
def test_calibrations_out_of_reach_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
