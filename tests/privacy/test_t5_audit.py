"""T5: an attacker on the shipped path measures what is claimed, and notices when it is not kept."""

import hashlib
import itertools
import time
from dataclasses import replace

import pytest
import torch
import worlds

from dpsgd import accounting, clipping, engines, rng
from dpsgd.auditing import Subject, audit_one_run, audit_two_worlds, self_checks
from dpsgd.noise import Gaussian
from dpsgd.sampling import Poisson, Shuffled

RUNS = 1000
NOISE = accounting.calibrate_noise_multiplier(
    target_epsilon=3.0, sample_rate=1.0, num_steps=2, delta=1e-5
)


@pytest.fixture(autouse=True)
def _known_keys(monkeypatch):
    """Keys in their order: what an audit measures is the same in every run of the tests."""
    made = (hashlib.sha256(b"key %d" % number).digest() for number in itertools.count())
    monkeypatch.setattr(rng, "fresh_key", lambda: next(made))


class Unclipped(clipping.Flat):
    """Claims what Flat claims and clips nothing."""

    def __call__(self, norms):
        return torch.ones_like(norms)


class Halved(Gaussian):
    def add_(self, sums, std, step, offsets=None):
        super().add_(sums, std / 2, step, offsets)


def dropping():
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 4)
    )
    return model, *worlds.vectors()[1:]


def subject(engine=engines.Hooks, build=worlds.vectors, **options):
    trainer, _ = worlds.trainer(
        build,
        engine,
        torch.float32,
        **{"noise_multiplier": NOISE, "steps": 2, "accountant": "pld", **options},
    )
    return Subject(trainer)


def audited(made, runs=RUNS, steps=2):
    return audit_two_worlds(made, runs=runs, steps=steps, confidence=0.99, seconds=120)


def test_the_measured_epsilon_lies_between_half_the_claim_and_the_claim():
    result = audited(subject())
    assert result.runs == RUNS
    assert result.claimed == pytest.approx(3.0, rel=2e-3)
    assert 0.5 * result.claimed <= result.epsilon_gaussian <= result.claimed
    assert 0 < result.epsilon <= result.claimed
    assert result.strength == pytest.approx(1.0, rel=1e-4)
    assert result.violated == []


@pytest.mark.parametrize("bug", ["half_noise", "unclipped"])
def test_a_broken_step_is_found_out(bug, monkeypatch):
    made = subject(policy=Unclipped(1.0)) if bug == "unclipped" else subject()
    if bug == "half_noise":
        original = Gaussian.add_
        monkeypatch.setattr(
            Gaussian, "add_", lambda self, sums, std, *rest: original(self, sums, std / 2, *rest)
        )
    result = audited(made, runs=300)
    assert result.violated
    assert result.epsilon_gaussian > result.claimed


def test_a_wrong_rate_is_found_out(monkeypatch):
    """Claimed 0.1, drawn always."""
    made = subject(rate=0.1, noise_multiplier=0.4)
    monkeypatch.setattr(Poisson, "sample", lambda self, step, stop, start=0: torch.arange(stop))
    assert audited(made, runs=400).violated


def test_an_honest_rate_passes():
    result = audited(subject(rate=0.3, noise_multiplier=0.6), runs=400)
    assert result.violated == []
    assert 0 < result.epsilon_gaussian <= result.claimed


@pytest.mark.parametrize("policy", [clipping.AdaptiveQuantile(1.0), clipping.PerLayer(1.0)])
def test_other_policies_pass(policy):
    assert audited(subject(policy=policy), runs=150).violated == []


def test_time_is_kept():
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"audit\.minutes"):
        audit_two_worlds(subject(), runs=1000, steps=2, confidence=0.99, seconds=0.0)
    assert time.monotonic() - start < 10


def test_the_one_run_bound_is_below_the_claim():
    made = subject(noise_multiplier=0.05)
    result = audit_one_run(made, canaries=20, steps=2, confidence=0.99)
    assert result.canaries == 20
    assert 0 < result.epsilon <= result.claimed


def test_one_run_swaps_units_where_units_are_replaced(monkeypatch):
    """As many records in every world, so that no batch is shifted."""
    made = subject(
        adjacency="replace_one", sampler=Shuffled(expected_batch_size=6, public_size=worlds.SIZE)
    )
    sizes, original = [], Subject.trainer
    monkeypatch.setattr(
        Subject,
        "trainer",
        lambda self, units, *rest: sizes.append(len(units)) or original(self, units, *rest),
    )
    result = audit_one_run(made, canaries=11, steps=2, confidence=0.99)
    assert sizes == [11]
    assert 0 <= result.epsilon <= result.claimed


def test_the_self_checks_hold():
    checks = {check.name: check for check in self_checks(subject(rate=0.2, noise_multiplier=1.0))}
    assert all(check.passed for check in checks.values()), checks
    assert len(checks) == 3


@pytest.mark.parametrize("engine", [engines.Ghost, engines.Vmap, engines.Hooks, engines.Loop])
def test_dropout_is_no_violation(engine):
    assert failed(subject(engine, dropping)) == []


def failed(made):
    return [check.name for check in self_checks(made) if not check.passed]


def test_t1_notices_a_missing_clip():
    assert failed(subject(policy=Unclipped(1.0))) == ["T1 sensitivity"]


def test_t2_notices_five_percent_less_noise(monkeypatch):
    original = Gaussian.add_
    monkeypatch.setattr(
        Gaussian, "add_", lambda self, sums, std, *rest: original(self, sums, 0.95 * std, *rest)
    )
    assert failed(subject()) == ["T2 noise law"]


def test_t2_notices_one_parameter_without_noise(monkeypatch):
    original = Gaussian.add_

    def all_but_the_last(self, sums, std, *rest):
        last = list(sums)[-1]
        before = sums[last].clone()
        original(self, sums, std, *rest)
        sums[last].copy_(before)

    monkeypatch.setattr(Gaussian, "add_", all_but_the_last)
    assert failed(subject()) == ["T2 noise law"]


def test_t2_notices_noise_used_twice(monkeypatch):
    original = Gaussian.add_

    def again(self, sums, std, step, offsets=None):
        self._used.clear()
        self._used_below = 0
        original(self, sums, std, step // 2, offsets)

    monkeypatch.setattr(Gaussian, "add_", again)
    assert failed(subject()) == ["T2 noise law"]


def test_t2_notices_parameters_that_share_their_noise(monkeypatch):
    original = Gaussian.add_

    def from_the_start(self, sums, std, step, offsets=None):
        for name in sums:
            self._used.clear()
            self._used_below = 0
            original(self, {name: sums[name]}, std, step)

    monkeypatch.setattr(Gaussian, "add_", from_the_start)
    assert failed(subject()) == ["T2 noise law"]


def test_t3_notices_a_fixed_batch_size(monkeypatch):
    def fixed(self, step, stop, start=0):
        return torch.randperm(stop)[: round(self.rate * stop)].sort().values

    made = subject(rate=0.2, noise_multiplier=1.0)
    monkeypatch.setattr(Poisson, "sample", fixed)
    assert "T3 sampler law" in failed(made)


def test_t3_notices_records_that_are_drawn_more_often_than_others(monkeypatch):
    original = Poisson.sample

    def every_other(self, step, stop, start=0):
        twice = replace(self, sample_rate=min(1.0, 2 * self.rate), expected_batch_size=None)
        return original(twice, step, (stop + 1) // 2) * 2

    made = subject(rate=0.1, noise_multiplier=1.0)
    monkeypatch.setattr(Poisson, "sample", every_other)
    assert "T3 sampler law" in failed(made)


def test_t3_notices_coins_that_are_kept_for_two_steps(monkeypatch):
    original = Poisson.sample
    made = subject(rate=0.1, noise_multiplier=1.0)
    monkeypatch.setattr(
        Poisson, "sample", lambda self, step, stop, start=0: original(self, step // 2, stop)
    )
    assert "T3 sampler law" in failed(made)


def test_the_models_weights_stay_as_they_are():
    made = subject()
    before = [p.detach().clone() for p in made.engine.model.parameters()]
    audited(made, runs=50)
    for p, q in zip(before, made.engine.model.parameters()):
        assert torch.equal(p, q)
