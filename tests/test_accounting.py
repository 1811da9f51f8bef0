"""Accounting against reference values, other accountants and its own monotony (T7)."""

import csv
import math
from pathlib import Path

import pytest

from dpsgd import accounting

ROWS = [
    {name: float(value) for name, value in row.items()}
    for row in csv.DictReader((Path(__file__).parent / "reference/accounting.csv").open())
]


def settings(row):
    return {
        "sample_rate": row["sample_rate"],
        "noise_multiplier": row["noise_multiplier"],
        "num_steps": int(row["num_steps"]),
        "delta": row["delta"],
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"q{row['sample_rate']:.3g}")
def test_reference_values(row):
    pld = accounting.epsilon(**settings(row))
    rdp = accounting.epsilon(**settings(row), accountant="rdp")
    assert pld == pytest.approx(row["epsilon_pld"], rel=1e-3)
    assert rdp == pytest.approx(row["epsilon_rdp"], rel=1e-3)
    assert rdp >= pld


@pytest.mark.parametrize("row", ROWS[:3] + ROWS[13:14], ids=lambda row: f"q{row['sample_rate']}")
def test_pld_lies_inside_the_interval_of_another_library(row):
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    steps = int(row["num_steps"])
    other = PRVAccountant(
        prvs=[
            PoissonSubsampledGaussianMechanism(
                sampling_probability=row["sample_rate"], noise_multiplier=row["noise_multiplier"]
            )
        ],
        max_self_compositions=[steps],
        eps_error=0.05,
        delta_error=row["delta"] * 1e-3,
    )
    low, _, high = other.compute_epsilon(delta=row["delta"], num_self_compositions=[steps])
    assert low <= accounting.epsilon(**settings(row)) <= high


BASE = {"sample_rate": 0.05, "noise_multiplier": 1.2, "num_steps": 100, "delta": 1e-5}


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"sample_rate": 0.06}, 1),
        ({"num_steps": 120}, 1),
        ({"noise_multiplier": 1.3}, -1),
        ({"delta": 1e-4}, -1),
    ],
)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_is_monotone(change, sign, accountant):
    base = accounting.epsilon(**BASE, accountant=accountant)
    moved = accounting.epsilon(**{**BASE, **change}, accountant=accountant)
    assert sign * (moved - base) > 0


def test_limits():
    assert accounting.epsilon(**{**BASE, "num_steps": 0}) == 0
    assert accounting.epsilon(**{**BASE, "sample_rate": 0}) == 0
    assert accounting.epsilon(**{**BASE, "noise_multiplier": 0}) == math.inf


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("target", [0.1, 1.0, 8.0])
def test_calibration_reaches_the_target_and_never_overshoots(target, accountant):
    plan = {"sample_rate": 0.1, "num_steps": 50, "delta": 1e-5, "accountant": accountant}
    noise = accounting.calibrate_noise_multiplier(target_epsilon=target, **plan)
    spent = accounting.epsilon(noise_multiplier=noise, **plan)
    assert target * (1 - 1e-3) <= spent <= target


def test_replacing_a_record_costs_more_than_adding_one():
    one = {"sample_rate": 1, "noise_multiplier": 1, "num_steps": 1, "delta": 1e-5}
    assert accounting.epsilon(**one, adjacency="replace_one") == pytest.approx(9.997, rel=1e-3)
    assert accounting.epsilon(**one) < 5


def test_replace_one_with_rdp_is_refused():
    with pytest.raises(ValueError, match="under-reports"):
        accounting.epsilon(**BASE, accountant="rdp", adjacency="replace_one")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"sample_rate": -0.1}, "sample_rate"),
        ({"noise_multiplier": -1}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"num_steps": -1}, "steps"),
        ({"num_steps": 2.5}, "steps"),
        ({"delta": 0}, "delta"),
        ({"delta": 1}, "delta"),
        ({"accountant": "gdp"}, "accountant"),
        ({"adjacency": "zero_out"}, "adjacency"),
    ],
)
def test_senseless_values_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        accounting.epsilon(**{**BASE, **change})


def test_a_target_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="reachable"):
        accounting.calibrate_noise_multiplier(
            target_epsilon=1e-9, sample_rate=1, num_steps=10_000, delta=1e-9, accountant="rdp"
        )


@pytest.mark.parametrize("noise", [0.003, 0.03, 0.2])
@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_hardly_any_noise_is_accounted_in_bounded_memory(noise, rate):
    plan = {"sample_rate": rate, "noise_multiplier": noise, "num_steps": 150, "delta": 1e-5}
    spent = accounting.epsilon(**plan)
    assert 1 / (2 * noise**2) < spent <= accounting.epsilon(**plan, accountant="rdp")
    assert spent > accounting.epsilon(**{**plan, "noise_multiplier": 2 * noise})


def test_the_curve_never_understates():
    curve = accounting.Curve(lambda n: accounting.epsilon(**{**BASE, "num_steps": n}), 100)
    assert curve(0) == 0
    assert curve(100) == accounting.epsilon(**BASE)
    for step in (1, 7, 33, 99):
        exact = accounting.epsilon(**{**BASE, "num_steps": step})
        assert exact <= curve(step) <= curve(100)
    with pytest.raises(ValueError, match="at most 100 steps"):
        curve(101)
