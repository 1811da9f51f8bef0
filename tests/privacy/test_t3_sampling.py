"""T3: every record joins every step with probability q, independently of all others."""

import math
from itertools import pairwise

import pytest
import torch
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpsgd import engines
from dpsgd.sampling import Poisson, poisson


def inclusions(q, records, steps, key=None):
    """[steps, records] of 0 and 1."""
    sampler = Poisson(sample_rate=q) if key is None else Poisson(sample_rate=q, key=key)
    drawn = torch.zeros(steps, records, dtype=torch.float64)
    for step in range(steps):
        drawn[step, sampler.sample(step, records)] = 1
    return drawn


@pytest.mark.parametrize("q", [0.02, 0.3, 0.7, 0.99])
def test_inclusions_are_binomial_and_batch_sizes_vary_as_they_should(q):
    steps, records = 3000, 60
    drawn = inclusions(q, records, steps)
    total = steps * records
    assert abs(drawn.sum() - q * total) < 5 * math.sqrt(total * q * (1 - q))
    for axis in (0, 1):  # no record and no step is favoured
        counts = drawn.sum(axis)
        low, high = stats.binom.interval(1 - 1e-6 / len(counts), drawn.shape[axis], q)
        assert low <= counts.min()
        assert counts.max() <= high
    sizes = drawn.sum(1)
    variance = records * q * (1 - q)
    assert abs(sizes.var() / variance - 1) < 6 * math.sqrt(2 / steps) + 6 / variance / steps


def test_records_are_pairwise_independent():
    drawn = inclusions(0.3, 40, 4000)
    centred = (drawn - 0.3) / math.sqrt(0.3 * 0.7)
    correlation = centred.T @ centred / len(drawn)
    off = correlation - torch.diag(correlation.diag())
    assert off.abs().max() < 5.5 / math.sqrt(len(drawn))


def test_steps_are_independent():
    drawn = inclusions(0.5, 2000, 20)
    centred = (drawn - 0.5) * 2
    correlation = centred @ centred.T / drawn.shape[1]
    off = correlation - torch.eye(len(drawn))
    assert off.abs().max() < 5.5 / math.sqrt(drawn.shape[1])


@pytest.mark.parametrize("q", [1e-7, 1e-5])
def test_small_rates_are_exact(q):
    """float32 coins would give 19 % too many at 1e-7."""
    records, steps = 10**8, 40 if q < 1e-6 else 4
    count = sum(len(Poisson(sample_rate=q).sample(step, records)) for step in range(steps))
    expected = q * records * steps
    assert abs(count - expected) < 5 * math.sqrt(expected)


def test_rate_one_takes_everything():
    assert torch.equal(Poisson(sample_rate=1.0).sample(3, 100), torch.arange(100))


@settings(max_examples=40, deadline=None)
@given(
    q=st.floats(1e-4, 1.0),
    records=st.integers(0, 5000),
    cuts=st.lists(st.integers(0, 5000), max_size=4),
    step=st.integers(0, 2**40),
)
def test_ranges_of_several_processes_make_up_one_draw(q, records, cuts, step):
    sampler = Poisson(sample_rate=q, key=bytes(32))
    edges = [0, *sorted(min(cut, records) for cut in cuts), records]
    parts = [sampler.sample(step, b, a) for a, b in pairwise(edges)]
    whole = sampler.sample(step, records)
    assert torch.equal(torch.cat(parts), whole)
    assert len(whole.unique()) == len(whole)


@settings(max_examples=30, deadline=None)
@given(q=st.floats(1e-3, 1.0), records=st.integers(0, 3000), more=st.integers(0, 3000))
def test_an_appended_record_moves_nobody_elses_coin(q, records, more):
    sampler = Poisson(sample_rate=q, key=bytes(32))
    longer = sampler.sample(0, records + more)
    assert torch.equal(longer[longer < records], sampler.sample(0, records))


def test_ranges_agree_across_blocks(monkeypatch):
    monkeypatch.setattr(poisson, "_BLOCK", 64)
    sampler = Poisson(sample_rate=0.3, key=bytes(32))
    whole = sampler.sample(1, 1000)
    parts = [sampler.sample(1, b, a) for a, b in ((0, 63), (63, 64), (64, 500), (500, 1000))]
    assert torch.equal(torch.cat(parts), whole)
    assert abs(len(whole) - 300) < 5 * math.sqrt(210)


def test_draws_repeat_with_the_key_and_change_without():
    a, b = Poisson(sample_rate=0.5, key=bytes(32)), Poisson(sample_rate=0.5, key=bytes(32))
    assert torch.equal(a.sample(4, 500), b.sample(4, 500))
    fresh = Poisson(sample_rate=0.5)
    assert not torch.equal(fresh.sample(4, 500), a.sample(4, 500))
    assert not torch.equal(a.sample(5, 500), a.sample(4, 500))


def test_empty_batches_happen_and_are_noised_stepped_and_charged():
    trainer, noise = worlds.trainer(
        worlds.vectors, engines.Vmap, torch.float32, rate=0.02, steps=20
    )
    sizes = [len(trainer.plan.sampler.sample(step, worlds.SIZE)) for step in range(20)]
    assert 0 in sizes
    before = [p.detach().clone() for p in trainer.step.engine.model.parameters()]
    reports = list(trainer.run())
    assert len(noise.released) == 20
    assert [report.step for report in reports] == list(range(1, 21))
    assert reports[-1].epsilon == pytest.approx(trainer.plan.epsilon())
    after = trainer.step.engine.model.parameters()
    assert all(not torch.equal(p, q) for p, q in zip(before, after))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sample_rate": 0.0}, "0 < sample_rate"),
        ({"sample_rate": 1.1}, "0 < sample_rate"),
        ({"sample_rate": float("nan")}, "0 < sample_rate"),
        ({}, "neither"),
        ({"sample_rate": 0.1, "expected_batch_size": 5.0}, "both"),
        ({"expected_batch_size": 5.0}, "public_size"),
        ({"expected_batch_size": 50.0, "public_size": 10}, "expected_batch_size <= public_size"),
        ({"sample_rate": 0.1, "public_size": 0}, "public_size"),
    ],
)
def test_senseless_settings_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Poisson(**arguments)


def test_rate_and_expected_batch_size_give_each_other():
    assert Poisson(sample_rate=0.25, public_size=100).expected_batch_size == 25
    assert Poisson(expected_batch_size=30, public_size=120).sample_rate == 0.25
