"""Batches that grow: every step is drawn, divided and accounted for at a rate of its own."""

import json
import re

import pytest
import torch
import worlds
from scipy import stats

from dpsgd import clipping, engines, ledger
from dpsgd.auditing import Subject, audit_two_worlds
from dpsgd.auditing.self_checks import sampler_law
from dpsgd.budget import Budget
from dpsgd.plan import PrivacyPlan, steps_for
from dpsgd.sampling import Poisson, Shuffled, TruncatedPoisson, UserPoisson, described
from dpsgd.schedules import CONSTANT, Schedule

GROWING = {0: 0.25, 6: 1.0}


def sampler(schedule=GROWING, rate=0.4, size=1000, **options):
    return Poisson(sample_rate=rate, public_size=size, schedule=schedule, **options)


def plan(steps=10, sigma=2.0, schedule=GROWING, **options):
    return PrivacyPlan(sampler(schedule), clipping.Flat(1.0), steps, sigma, 1e-5, **options)


def by_hand(*parts, accountant="pld"):
    """Epsilon of (rate, noise multiplier, steps), composed with dp-accounting alone."""
    import dp_accounting

    kinds = {"pld": dp_accounting.pld.PLDAccountant, "rdp": dp_accounting.rdp.RdpAccountant}
    made = kinds[accountant]()
    for rate, sigma, steps in parts:
        gaussian = dp_accounting.GaussianDpEvent(sigma)
        made.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), steps)
    return made.get_epsilon(1e-5)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_two_rates_are_composed_exactly(accountant):
    expected = by_hand((0.1, 2.0, 6), (0.4, 2.0, 4), accountant=accountant)
    assert plan(accountant=accountant).epsilon() == pytest.approx(expected, rel=1e-6)
    alone = by_hand((0.1, 2.0, 6), accountant=accountant)
    assert plan(accountant=accountant).epsilon(6) == pytest.approx(alone, rel=1e-6)


def test_rate_and_noise_may_change_at_different_steps():
    made = plan(noise_schedule=Schedule({0: 1.0, 3: 2.0, 8: 0.5}))
    parts = (0.1, 2.0, 3), (0.1, 4.0, 3), (0.4, 4.0, 2), (0.4, 1.0, 2)
    assert made.epsilon() == pytest.approx(by_hand(*parts), rel=1e-6)


def test_a_target_is_reached_and_not_exceeded():
    made = PrivacyPlan.make(
        sampler(), clipping.Flat(1.0), num_steps=10, target_delta=1e-5, target_epsilon=2.0
    )
    assert 2.0 * (1 - 1e-3) <= made.epsilon() <= 2.0


def test_every_step_draws_at_its_own_rate():
    """T3: inclusions are binomial with the rate of the step."""
    records, units = 4000, sampler(size=4000)
    counts = torch.tensor([len(units.sample(step, records)) for step in range(12)])
    for step, count in enumerate(counts.tolist()):
        q = 0.1 if step < 6 else 0.4
        assert units.rate_at(step) == pytest.approx(q)
        low, high = stats.binom.interval(1 - 1e-7, records, q)
        assert low <= count <= high
    again = Poisson(sample_rate=0.4, key=units.key)
    assert torch.equal(units.sample(9, records), again.sample(9, records))


def test_the_audit_tries_the_law_of_every_rate():
    class Forgetful(Poisson):
        """Draws every step at the last rate."""

        def sample(self, step, stop, start=0):
            return super().sample(6 + step, stop, start)

    assert sampler_law(sampler()).passed
    options = {"sample_rate": 0.4, "public_size": 1000, "schedule": GROWING}
    assert not sampler_law(Forgetful(**options)).passed


def test_each_sum_is_divided_by_the_expected_batch_of_its_step():
    units = sampler({0: 0.5, 2: 1.0}, rate=0.5, size=worlds.SIZE, key=worlds.KEY)
    trainer, noise = worlds.trainer(
        worlds.vectors, engines.Vmap, torch.float32, sampler=units, steps=4
    )
    sizes = []
    for _ in trainer.run():
        for name, p in trainer.step.engine.model.named_parameters():
            sizes.append(float((noise.released[-1][name] / p.grad).median()))
            break
    assert sizes == pytest.approx([3, 3, 6, 6], rel=1e-5)
    assert [trainer.plan.expected_batch_size_at(step) for step in range(4)] == [3, 3, 6, 6]


def test_a_policy_that_learns_is_told_the_batch_of_the_step(monkeypatch):
    told = []
    learned = clipping.AdaptiveQuantile.learned

    def watched(self, statistic, expected_batch_size):
        told.append(expected_batch_size)
        return learned(self, statistic, expected_batch_size)

    monkeypatch.setattr(clipping.AdaptiveQuantile, "learned", watched)
    units = sampler({0: 0.5, 2: 1.0}, rate=0.5, size=worlds.SIZE)
    policy = clipping.AdaptiveQuantile(1.0)
    trainer, _ = worlds.trainer(
        worlds.vectors, engines.Vmap, torch.float32, sampler=units, steps=3, policy=policy
    )
    list(trainer.run())
    assert told == [3, 3, 6]


def test_a_record_moves_a_sum_by_at_most_c_before_and_after_the_change():
    """T1: the rate has nothing to do with it."""
    released = []
    for extra in ((), ((torch.full((6,), 1e3), torch.tensor(1)),)):
        units = sampler({0: 0.5, 2: 1.0}, rate=1.0, size=worlds.SIZE, key=worlds.KEY)
        trainer, noise = worlds.trainer(
            worlds.vectors, engines.Vmap, torch.float64, extra, sampler=units, steps=4
        )
        frozen = [p.detach().clone() for p in trainer.step.engine.model.parameters()]
        for _ in trainer.run():  # an attacker may put the weights back
            for p, before in zip(trainer.step.engine.model.parameters(), frozen):
                p.data.copy_(before)
        released.append(noise.released)
    moves = [worlds.moved(a, b) for a, b in zip(*released)]
    assert all(move <= 1 + 1e-9 for move in moves)
    assert moves[2] == pytest.approx(1, abs=1e-6)
    assert moves[3] == pytest.approx(1, abs=1e-6)


def charge(path, made, *attempts):
    book = ledger.Ledger(path, bytes(32), made.describe())
    for number, steps in enumerate(attempts):
        for step in steps:
            book.intend(step, made.noise_at(step), number)
    book.close()
    return ledger.read(path, bytes(32))


def test_epsilon_follows_from_the_ledger_alone(tmp_path):
    made = plan()
    found = charge(tmp_path / "l", made, range(10))
    assert found.epsilon() == pytest.approx(made.epsilon(), rel=1e-9)
    part = charge(tmp_path / "p", made, range(7))
    assert part.epsilon() == pytest.approx(by_hand((0.1, 2.0, 6), (0.4, 2.0, 1)), rel=1e-6)


def test_repeated_steps_are_charged_at_their_own_rates(tmp_path):
    made = plan()
    found = charge(tmp_path / "l", made, range(8), range(5, 9))
    expected = by_hand((0.1, 2.0, 7), (0.4, 2.0, 5))
    assert found.epsilon() == pytest.approx(expected, rel=1e-6)
    budget = Budget(made, found.attempts[:1], 5)
    assert budget.epsilon(9) == pytest.approx(expected, rel=1e-6)
    last = budget.last_step()
    assert budget.epsilon(last) <= made.epsilon() * (1 + 1e-6) < budget.epsilon(last + 1)


@pytest.mark.parametrize(
    "made",
    [
        sampler(),
        UserPoisson(sample_rate=0.1, public_size=9, records_per_user=2, schedule=GROWING),
        TruncatedPoisson(sample_rate=0.1, public_size=90, max_batch_size=20, schedule=GROWING),
    ],
    ids=lambda made: type(made).__name__,
)
def test_a_description_holds_the_schedule(made):
    description = json.loads(json.dumps(made.describe()))
    assert description == made.describe()
    again = described(description)
    assert again.releases([(2.0, 10)], 3) == made.releases([(2.0, 10)], 3)
    assert len(made.releases([(2.0, 10)], 3)) == 2


def test_without_a_schedule_nothing_is_said_of_it():
    assert "schedule" not in sampler(None).describe()
    assert sampler(None).factors == sampler({0: 1.0}).factors == CONSTANT
    assert plan(schedule={0: 1.0}).epsilon() == plan(schedule=None).epsilon()


def test_epochs_count_what_is_drawn():
    assert plan().epochs == pytest.approx(6 * 0.1 + 4 * 0.4)
    schedule = Schedule(GROWING)
    assert steps_for(0.6, 0.4, schedule) == 6
    assert steps_for(0.61, 0.4, schedule) == 7
    assert steps_for(0.05, 0.4, schedule) == 1
    assert steps_for(2.2, 0.4, schedule) == 10
    assert plan(steps=steps_for(5, 0.4, schedule)).epochs >= 5


def test_runs_are_cut_where_the_factor_changes():
    schedule = Schedule({0: 1.0, 3: 2.0, 5: 3.0})
    assert list(schedule.split([("a", 4), ("b", 3)])) == [
        (1.0, "a", 3), (2.0, "a", 1), (2.0, "b", 1), (3.0, "b", 2),
    ]  # fmt: skip
    assert list(schedule.split([("a", 2)], start=4)) == [(2.0, "a", 1), (3.0, "a", 1)]
    assert schedule.total(6) == 3 + 4 + 3
    assert schedule.extremes(4) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sampler({0: 1.0, 5: 3.0}), "every factor of schedule <= 1"),
        (lambda: sampler({5: 1.0}), "starts at step 0"),
        (lambda: sampler({0: -1.0}), "factor > 0"),
        (lambda: sampler(3), "schedule as {step: factor}"),
        (lambda: TruncatedPoisson(sample_rate=0.1, public_size=100, max_batch_size=12,
                                  schedule={0: 1.0, 3: 2.0}), "expected_batch_size = 20"),
        (lambda: described({"sampler": "poisson", "sample_rate": 0.5, "schedule": {"0": 3.0}}),
         "every factor"),
        (lambda: described({"sampler": "poisson", "sample_rate": 0.5, "schedule": [1]}),
         "schedule as {step: factor}"),
    ],
)  # fmt: skip
def test_senseless_schedules_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_rate_of_one_may_be_reached_by_rounding():
    q = 0.07
    assert sampler({0: 1.0, 1: 1 / q}, rate=q).rate_at(1) == 1.0
    with pytest.raises(TypeError):
        Shuffled(sample_rate=0.1, public_size=10, schedule=GROWING)


def test_a_step_with_another_schedule_is_refused():
    units = sampler({0: 0.5, 2: 1.0}, rate=0.5, size=worlds.SIZE)
    trainer, _ = worlds.trainer(worlds.vectors, engines.Vmap, torch.float32, sampler=units)
    trainer.step.batch_schedule = CONSTANT
    with pytest.raises(ValueError, match="Expected batch_schedule"):
        type(trainer)(trainer.step, trainer.data, trainer.plan, physical_batch_size=4)


def account(*arguments, cwd, check=True):
    from command_line import command

    return command(*arguments, cwd=cwd, module="dpsgd.account", check=check)


WORDS = ("sampler.sample_rate=0.4", "sampler.schedule={0:0.25,6:1.0}")


def test_account_shows_the_range_and_counts_epochs(tmp_path):
    given = (*WORDS, "trainer.epochs=2.2", "data.public_size=1000")
    out = account(*given, "privacy.noise_multiplier=2", cwd=tmp_path).stdout
    out = re.sub(r"[\s│]+", " ", out)
    assert "rate 0.1 to 0.4, expected batch 100 to 400 of 1000 records" in out
    assert "10 (2.2 epochs)" in out
    assert f"epsilon {plan().epsilon():.4f}" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            [*WORDS, "account.solve=sample_rate", "privacy.noise_multiplier=3"],
            "one rate for all steps",
        ),
        (["sampler.schedule={0:1.0,5:3.0}"], "every factor of schedule <= 1"),
        (["sampler=shuffled", "+sampler.schedule={0:0.5}"], "takes no 'schedule'"),
        (["plan=compute", WORDS[1]], "one rate for all steps"),
    ],
)
def test_what_has_no_sense_is_refused_by_name(arguments, words, tmp_path):
    done = account(*arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_steps_are_solved_for_along_the_schedule(tmp_path):
    given = (*WORDS, "privacy.noise_multiplier=2", "privacy.target_epsilon=2")
    out = account(*given, "account.solve=num_steps", "data.public_size=1000", cwd=tmp_path).stdout
    steps = int(re.search(r"steps\s+│ (\d+)", out)[1])
    assert plan(steps=steps).epsilon() <= 2.0 < plan(steps=steps + 1).epsilon()


@pytest.mark.slow
def test_an_attacker_measures_what_is_claimed_of_a_schedule():
    """T5: two steps that draw half of the records, and two that draw all."""
    units = sampler({0: 0.5, 2: 1.0}, rate=1.0, size=worlds.SIZE, key=worlds.KEY)
    trainer, _ = worlds.trainer(
        worlds.vectors,
        engines.Hooks,
        torch.float32,
        sampler=units,
        steps=4,
        noise_multiplier=1.5,
        accountant="pld",
    )
    found = audit_two_worlds(Subject(trainer), runs=300, steps=4, confidence=0.99, seconds=60)
    assert found.violated == []
    assert 0.35 * found.claimed <= found.epsilon_gaussian <= found.claimed
