"""T3 for truncated, shuffled and user-level sampling."""

import math

import pytest
import torch
from scipy import stats

from dpsgd import accounting, clipping
from dpsgd.data import Dataset, Users
from dpsgd.plan import PrivacyPlan
from dpsgd.sampling import Poisson, Shuffled, TruncatedPoisson, UserPoisson, described


def truncated(limit=20, q=0.3, size=50, **key):
    return TruncatedPoisson(sample_rate=q, public_size=size, max_batch_size=limit, **key)


def test_truncated_batches_never_exceed_their_limit_and_favour_nobody():
    steps, size = 4000, 50
    sampler = truncated()
    drawn = torch.zeros(steps, size)
    for step in range(steps):
        drawn[step, sampler.sample(step, size)] = 1
    sizes = drawn.sum(1)
    assert sizes.max() == 20
    law = stats.binom(size, 0.3)
    expected = steps * (sum(k * law.pmf(k) for k in range(20)) + 20 * law.sf(19))
    assert abs(drawn.sum() - expected) < 5 * math.sqrt(expected)
    share = float(drawn.sum()) / steps / size
    low, high = stats.binom.interval(1 - 1e-6, steps, share)
    assert low <= drawn.sum(0).min()
    assert drawn.sum(0).max() <= high


def test_a_draw_within_the_limit_is_the_poisson_draw():
    key = bytes(32)
    sampler, plain = truncated(limit=50, key=key), Poisson(sample_rate=0.3, key=key)
    assert all(torch.equal(sampler.sample(s, 50), plain.sample(s, 50)) for s in range(20))


def test_truncation_costs_more_than_poisson_and_little_when_it_is_rare():
    def epsilon(sampler):
        return PrivacyPlan(sampler, clipping.Flat(1.0), 20, 1.0, 1e-5).epsilon()

    free = epsilon(Poisson(sample_rate=0.1, public_size=1000))
    rare = epsilon(truncated(170, 0.1, 1000))
    often = epsilon(truncated(100, 0.1, 1000))
    assert free <= rare * (1 + 1e-6)
    assert rare < 1.01 * free
    assert often > 1.1 * free


@pytest.mark.parametrize("size", [1, 12, 13])
def test_every_record_is_in_one_batch_of_an_epoch(size):
    sampler = Shuffled(expected_batch_size=min(4, size), public_size=size)
    for epoch in range(3):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        batches = [sampler.sample(step, size) for step in steps]
        assert torch.cat(batches).sort().values.tolist() == list(range(size))
        assert all(0 < len(batch) <= 4 for batch in batches)


def test_epochs_are_shuffled_anew_and_repeat_with_the_key():
    sampler = Shuffled(expected_batch_size=50, public_size=100, key=bytes(32))
    again = Shuffled(expected_batch_size=50, public_size=100, key=bytes(32))
    assert torch.equal(sampler.sample(3, 100), again.sample(3, 100))
    assert not torch.equal(sampler.sample(0, 100), sampler.sample(2, 100))


def test_ranges_of_several_processes_make_up_a_shuffled_batch():
    sampler = Shuffled(expected_batch_size=20, public_size=100)
    parts = [sampler.sample(2, stop, start) for start, stop in ((0, 30), (30, 31), (31, 100))]
    assert torch.equal(torch.cat(parts), sampler.sample(2, 100))


def test_shuffling_is_charged_a_gaussian_per_begun_epoch_and_no_amplification():
    """One epoch, sigma 0.7, 1000 steps: Poisson would say 0.98 at delta 1e-6 (privacy of Chua)."""
    sampler = Shuffled(expected_batch_size=100, public_size=100_000)
    plan = PrivacyPlan(sampler, clipping.Flat(1.0), 1000, 0.7, 1e-6, adjacency="replace_one")
    poisson = accounting.epsilon(
        sample_rate=0.001, noise_multiplier=0.7, num_steps=1000, delta=1e-6
    )
    assert poisson == pytest.approx(0.98, rel=0.02)
    assert plan.epsilon() > 7.31
    one = accounting.epsilon(
        sample_rate=1, noise_multiplier=0.7, num_steps=1, delta=1e-6, adjacency="replace_one"
    )
    assert plan.epsilon() == pytest.approx(one)
    assert plan.epsilon(1) == plan.epsilon(1000)
    assert plan.epsilon(1000) == pytest.approx(one)
    longer = PrivacyPlan(sampler, clipping.Flat(1.0), 1001, 0.7, 1e-6, adjacency="replace_one")
    assert longer.epsilon() > 1.3 * one


def test_the_least_noise_of_an_epoch_counts():
    sampler = Shuffled(expected_batch_size=5, public_size=10)
    (event, count), (other, last) = sampler.releases([(2.0, 1), (1.0, 1), (3.0, 1)])
    assert (event.noise_multiplier, count) == (1.0, 1)
    assert (other.noise_multiplier, last) == (3.0, 1)


def users_of(ids, k=2, key=bytes(32)):
    n = len(ids)
    data = Dataset(
        (torch.arange(n).float()[:, None], torch.zeros(n, dtype=torch.int64)),
        None,
        input_shape=[1],
        num_classes=2,
        public_size=n,
        users=torch.tensor(ids),
    )
    return Users(data, k, key)


def test_a_user_brings_records_of_its_own_only_and_at_most_k():
    ids = [5, 5, 5, 5, -2, 9, 9]
    users = users_of(ids)
    assert len(users) == 3
    for step in range(20):
        rows, present = users.choose(torch.tensor([0, 1, 2]), step)
        owners = torch.tensor(ids)[rows]
        assert owners.tolist() == [[-2, -2], [5, 5], [9, 9]]
        assert present.tolist() == [[True, False], [True, True], [True, True]]
        chosen = [row[p].tolist() for row, p in zip(rows, present)]
        assert all(len(set(row)) == len(row) for row in chosen)


def test_no_user_brings_no_record():
    rows, present = users_of([5, 5, 7]).choose(torch.empty(0, dtype=torch.int64), 0)
    assert rows.shape == present.shape == (0, 2)


def test_every_record_of_a_user_gets_its_turn():
    users = users_of([3] * 6 + [4])
    counts = torch.zeros(7)
    for step in range(3000):
        rows, present = users.choose(torch.tensor([0]), step)
        counts[rows[present]] += 1
    expected = 3000 * 2 / 6
    assert (counts[:6] - expected).abs().max() < 5 * math.sqrt(expected)


def test_an_added_user_changes_no_other_users_records():
    few, more = users_of([1, 1, 1, 2, 2, 2]), users_of([1, 1, 1, 2, 2, 2, 3, 3, 3])
    for step in range(10):
        a = few.choose(torch.tensor([0, 1]), step)
        b = more.choose(torch.tensor([0, 1, 2]), step)
        assert torch.equal(a[1], b[1][:2])
        assert set(a[0].flatten().tolist()) <= set(range(6))


@pytest.mark.parametrize(
    "sampler",
    [
        Poisson(sample_rate=0.1, public_size=100),
        truncated(),
        Shuffled(expected_batch_size=10, public_size=95),
        UserPoisson(sample_rate=0.2, public_size=10, records_per_user=3),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_a_description_is_enough_to_account_anew(sampler):
    noise = [(1.5, 7), (2.5, 4)]
    assert described(sampler.describe()).releases(noise) == sampler.releases(noise)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: truncated(limit=10), "max_batch_size >= expected"),
        (lambda: truncated(limit=0), "max_batch_size"),
        (lambda: TruncatedPoisson(sample_rate=0.1, max_batch_size=5), "public_size"),
        (lambda: Shuffled(expected_batch_size=2.5, public_size=10), "whole expected_batch_size"),
        (lambda: Shuffled(sample_rate=0.5), "public_size"),
        (lambda: UserPoisson(sample_rate=0.1, records_per_user=0), "records_per_user"),
        (lambda: described({"sampler": "mine"}), "Expected a sampler out of"),
        (lambda: described({"sampler": "poisson", "rate": 1}), "figures of a poisson"),
        (lambda: truncated().sample(0, 50, 10), "start=0"),
    ],
)
def test_senseless_samplers_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


THEOREMS = [
    ("poisson", "add_remove", "pld", True),
    ("poisson", "add_remove", "rdp", True),
    ("poisson", "replace_one", "pld", True),
    ("poisson", "replace_one", "rdp", False),
    ("truncated", "add_remove", "pld", True),
    ("truncated", "add_remove", "rdp", False),
    ("truncated", "replace_one", "pld", False),
    ("shuffled", "add_remove", "pld", False),
    ("shuffled", "add_remove", "rdp", False),
    ("shuffled", "replace_one", "pld", True),
    ("shuffled", "replace_one", "rdp", False),
    ("users", "add_remove", "rdp", True),
    ("users", "replace_one", "rdp", False),
]


@pytest.mark.parametrize(("kind", "adjacency", "accountant", "covered"), THEOREMS)
def test_only_combinations_with_a_theorem_make_a_plan(kind, adjacency, accountant, covered):
    sampler = {
        "poisson": Poisson(sample_rate=0.1, public_size=100),
        "truncated": truncated(),
        "shuffled": Shuffled(expected_batch_size=10, public_size=100),
        "users": UserPoisson(sample_rate=0.1, public_size=100),
    }[kind]

    def plan():
        return PrivacyPlan(sampler, clipping.Flat(1.0), 5, 2.0, 1e-5, adjacency, accountant)

    if covered:
        assert 0 < plan().epsilon() < math.inf
    else:
        with pytest.raises(ValueError, match=r"theorem covers|under-reports"):
            plan()


@pytest.mark.slow
def test_a_step_over_a_hundred_million_records_is_cheap_in_memory():
    import tracemalloc

    sampler = Poisson(sample_rate=1e-6, public_size=10**8)
    tracemalloc.start()
    drawn = sampler.sample(0, 10**8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 40 < len(drawn) < 180
    assert peak < 2**20
