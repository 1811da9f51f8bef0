"""Steps against noise within a compute budget: the figures, the recommendation, the command."""

import math
import shlex
from itertools import pairwise

import pytest
from command_line import command

from dpsgd import accounting
from dpsgd.accounting import BatchChoice, batch_choices, recommended

BUDGET = {"public_size": 20_000, "epochs": 40, "target_epsilon": 3.0, "delta": 1e-5}


@pytest.fixture(scope="module")
def choices():
    return batch_choices(**BUDGET)


def test_each_choice_has_the_noise_that_a_calibration_of_its_own_finds(choices):
    """The coarser grid may ask for 0.3 % more noise, never for less than the target needs."""
    for choice in (choices[5], choices[-1]):
        spent = accounting.epsilon(
            sample_rate=choice.sample_rate,
            noise_multiplier=choice.noise_multiplier,
            num_steps=choice.num_steps,
            delta=1e-5,
        )
        assert 3.0 * (1 - 4e-3) <= spent <= 3.0
        alone = accounting.calibrate_noise_multiplier(
            target_epsilon=3.0,
            sample_rate=choice.sample_rate,
            num_steps=choice.num_steps,
            delta=1e-5,
        )
        assert choice.noise_multiplier == pytest.approx(alone, rel=3e-3)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_a_larger_batch_needs_fewer_steps_and_less_noise_in_the_same_budget(accountant):
    found = batch_choices(**BUDGET, accountant=accountant)
    assert len(found) >= 10
    assert found[-1].expected_batch_size == 20_000
    for a, b in pairwise(found):
        assert a.expected_batch_size < b.expected_batch_size
        assert a.num_steps > b.num_steps
        assert a.noise_multiplier < b.noise_multiplier
        assert a.noise_of_one_update > b.noise_of_one_update
        assert a.signal_to_noise < b.signal_to_noise * 1.005
    for each in found:
        budget = each.expected_batch_size * each.num_steps
        assert budget == pytest.approx(40 * 20_000, abs=each.expected_batch_size / 2)


def test_the_whole_data_is_one_gaussian(choices):
    """Signal to noise at rate 1 is mu / sqrt(2) of the Gaussian that the steps are together."""
    import dp_accounting

    mu = 1 / dp_accounting.get_sigma_gaussian(3.0, 1e-5)
    assert choices[-1].signal_to_noise == pytest.approx(mu / math.sqrt(2), rel=2e-3)


def test_the_noises_of_a_choice():
    choice = BatchChoice(100.0, 0.01, 400, 2.0)
    assert choice.noise_of_one_update == 0.02
    assert choice.noise_of_their_mean == pytest.approx(0.001)
    assert choice.signal_to_noise == pytest.approx(0.005 * math.sqrt(200))


def test_the_smallest_batch_within_ten_percent_of_the_best_is_recommended(choices):
    best = recommended(choices)
    most = max(choice.signal_to_noise for choice in choices)
    assert best.signal_to_noise >= 0.9 * most
    for choice in choices:
        if choice.expected_batch_size < best.expected_batch_size:
            assert choice.signal_to_noise < 0.9 * most
    made = [BatchChoice(b, q, 10, s) for b, q, s in ((1, 0.1, 1.0), (2, 0.2, 1.05), (3, 0.3, 1.5))]
    assert recommended(made) is made[1]


def test_a_limit_bounds_the_batches():
    found = batch_choices(**BUDGET, max_batch_size=300, accountant="rdp")
    assert found[-1].expected_batch_size == 300
    assert found[0].expected_batch_size >= 1


def test_a_short_budget_leaves_ten_steps():
    found = batch_choices(**{**BUDGET, "epochs": 2})
    assert found[-1].num_steps == 10
    assert found[-1].expected_batch_size == 4000


def test_replacing_a_record_needs_more_noise(choices):
    found = batch_choices(**BUDGET, adjacency="replace_one")
    assert found[-1].noise_multiplier > 1.9 * choices[-1].noise_multiplier


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"public_size": 0}, "public_size >= 1"),
        ({"epochs": 0}, "epochs > 0"),
        ({"epochs": math.inf}, "epochs > 0"),
        ({"epochs": 1e-6}, "at least 10 steps"),
        ({"target_epsilon": 0}, "target_epsilon > 0"),
        ({"delta": 1e-3}, "delta < 1 / public size"),
        ({"max_batch_size": 0}, "max_batch_size >= 1"),
        ({"adjacency": "replace_one", "accountant": "rdp"}, "under-reports"),
    ],
)
def test_senseless_budgets_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        batch_choices(**{**BUDGET, **wrong})


def test_nothing_is_recommended_of_nothing():
    with pytest.raises(ValueError, match="at least one choice"):
        recommended([])


def compute(*arguments, cwd, check=True):
    words = ("plan=compute", "accountant=rdp", *arguments)
    return command(*words, cwd=cwd, module="dpsgd.account", check=check)


def test_the_command_line_recommends_a_command(tmp_path):
    given = ("data.public_size=20000", "plan.epochs=40", "privacy.target_delta=1e-6")
    out = compute(*given, "account.plot=c.svg", cwd=tmp_path).stdout
    line = next(line for line in out.splitlines() if line.startswith("python -m dpsgd.train"))
    words = shlex.split(line)[3:]
    figures = {**BUDGET, "delta": 1e-6, "accountant": "rdp"}
    best = recommended(batch_choices(**figures))
    assert words == [
        "accountant=rdp",
        "data.public_size=20000",
        "privacy.target_delta=1e-6",
        f"sampler.expected_batch_size={best.expected_batch_size:.0f}",
        f"trainer.num_steps={best.num_steps}",
        "privacy.target_epsilon=3",
    ]
    marked = next(line for line in out.splitlines() if "recommended" in line)
    assert float(marked.split()[0]) == best.expected_batch_size
    assert float(marked.split()[3]) == pytest.approx(best.noise_multiplier, abs=1e-3)
    assert "recommended" in (tmp_path / "c.svg").read_text()


def test_users_are_counted_for_a_sampler_of_users(tmp_path):
    out = compute("sampler=user_poisson", "sampler.public_size=500", cwd=tmp_path).stdout
    assert "60 epochs of 500 users" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan.epochs=0"], "epochs > 0"),
        (["plan.epochs=null"], "plan.epochs"),
        (["plan.max_batch_size=0"], "max_batch_size >= 1"),
        (["privacy.target_epsilon=null"], "privacy.target_epsilon"),
        (["privacy.noise_multiplier=3"], "got privacy.noise_multiplier=3"),
        (["privacy.noise_schedule={0:1.0}"], "got privacy.noise_schedule"),
        (["trainer.num_steps=5"], "got trainer.num_steps=5"),
        (["sampler.sample_rate=0.5"], "got sampler.sample_rate=0.5"),
        (["account.solve=num_steps"], "got account.solve=num_steps"),
        (["sampler=truncated_poisson"], "poisson or user_poisson to compare"),
        (["sampler=shuffled"], "poisson or user_poisson to compare"),
        (["plan.kind=luck"], "plan=compute or no setting"),
        (["plan=none", "+plan.epochs=3"], "plan=compute or no setting"),
        (["account.plot=x.mp3"], "account.plot"),
    ],
)
def test_bad_input_gives_one_message(arguments, words, tmp_path):
    done = compute(*arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
