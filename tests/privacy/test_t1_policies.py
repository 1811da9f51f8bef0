"""T1 for every clipping policy, sampler and adjacency: the bound of each, and no more than it."""

import math
from dataclasses import replace

import pytest
import torch
import worlds
from cases import ENGINES
from test_t1_sensitivity import HOSTILE, LIMIT

from dpsgd import clipping, engines
from dpsgd.losses import PerUser, cross_entropy
from dpsgd.sampling import Poisson, Shuffled, TruncatedPoisson, UserPoisson
from dpsgd.schedules import Schedule

ALL = {"loop": engines.Loop, **ENGINES}
POLICIES = {
    "flat": clipping.Flat(1.0),
    "per_layer": clipping.PerLayer(1.0),
    "grouped": clipping.Grouped(
        1.0, patterns={"one": "0.*", "rest": "*"}, shares={"one": 3, "rest": 1}
    ),
    "automatic": clipping.Automatic(1.0),
    "normalised": clipping.Normalised(1.0),
    "unit_norm": clipping.UnitNorm(0.5),
    "adaptive": clipping.AdaptiveQuantile(1.0, count_share=0.5),
    "scheduled": clipping.Flat(1.0, schedule={0: 0.5, 1: 2.0}),
}  # fmt: skip


def released(policy, engine, extra=(), dtype=torch.float32, **options):
    trainer, noise = worlds.trainer(
        worlds.vectors, engine, dtype, extra, policy=policy, accountant="pld", **options
    )
    list(trainer.run())
    return trainer, noise.released


def hostile(name):
    return [(HOSTILE[name][:6], torch.tensor(3))]


@pytest.mark.parametrize("record", ["ordinary", "huge", "large", "one_nan", "minus_inf", "zero"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("engine", ["loop", "hooks", "vmap", "ghost", "opacus-hooks"])
def test_a_record_moves_sum_and_statistic_by_at_most_the_bound(engine, policy, record):
    clip = POLICIES[policy]
    trainer, first = released(clip, ALL[engine])
    _, second = released(clip, ALL[engine], hostile(record))
    bound = trainer.plan.movement * clip.at(0).sensitivity
    assert worlds.moved(first[0], second[0]) <= bound * LIMIT


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("engine", ["hooks", "ghost"])
def test_the_bound_holds_in_bfloat16(engine, policy):
    clip = POLICIES[policy]
    _, first = released(clip, ALL[engine], dtype=torch.bfloat16)
    for record in ("ordinary", "huge", "one_nan"):
        _, second = released(clip, ALL[engine], hostile(record), dtype=torch.bfloat16)
        assert worlds.moved(first[0], second[0]) <= clip.at(0).sensitivity * LIMIT


@pytest.mark.parametrize(
    "policy", ["flat", "per_layer", "grouped", "normalised", "unit_norm", "automatic"]
)
def test_a_large_record_uses_the_bound_up(policy):
    """The bound is not met by clipping more than has to be."""
    x = torch.linspace(-1, 1, 6) * 5
    _, first = released(POLICIES[policy], engines.Loop)
    _, second = released(POLICIES[policy], engines.Loop, [(x, torch.tensor(3))])
    assert worlds.moved(first[0], second[0]) > 0.7


def test_the_count_of_an_adaptive_policy_is_part_of_the_release():
    trainer, released_ = released(POLICIES["adaptive"], engines.Loop)
    (count,) = [total for name, total in released_[0].items() if "statistic" in name]
    assert count.shape == (1,)
    clip = POLICIES["adaptive"]
    assert clip.sensitivity == pytest.approx(math.sqrt(1.25))
    share = float(count[0]) / (2 * 0.5 * 1.0) / worlds.SIZE + 0.5
    moved = math.exp(-clip.learning_rate * (share - clip.quantile))
    assert trainer.step.clipping.max_grad_norm == pytest.approx(moved)


def test_an_adaptive_policy_finds_the_quantile():
    policy = clipping.AdaptiveQuantile(50.0, quantile=0.5, learning_rate=0.5)
    trainer, _ = worlds.trainer(
        worlds.vectors, engines.Vmap, torch.float32, policy=policy, steps=60, noise_multiplier=0.05,
        accountant="rdp",
    )  # fmt: skip
    trainer.step.optimizer.param_groups[0]["lr"] = 0.0
    norms = trainer.step.engine(trainer.data.train).norms()[:, 0]
    list(trainer.run())
    below = (norms <= trainer.step.clipping.max_grad_norm).double().mean()
    assert 0.25 <= below <= 0.75


def test_the_noise_follows_a_schedule_of_c_and_of_sigma():
    policy = clipping.Flat(1.0, schedule={0: 1.0, 2: 4.0})
    stds = []
    trainer, noise = worlds.trainer(
        worlds.vectors, engines.Vmap, torch.float32, policy=policy, steps=4, noise_multiplier=2.0,
        noise_schedule=Schedule({0: 1.0, 1: 3.0}),
    )  # fmt: skip
    original = type(noise).add_
    trainer.step.noise.add_ = lambda sums, std, step, offsets: (
        stds.append(std), original(noise, sums, std, step)
    )  # fmt: skip
    list(trainer.run())
    assert stds == [2.0, 6.0, 24.0, 24.0]


def shuffled(**changes):
    return Shuffled(expected_batch_size=4, public_size=worlds.SIZE, key=worlds.KEY, **changes)


@pytest.mark.parametrize("record", ["ordinary", "huge", "one_nan"])
def test_replacing_a_record_of_shuffled_batches_moves_an_epoch_by_two_c(record):
    options = {
        "sampler": shuffled(),
        "adjacency": "replace_one",
        "steps": 3,
        "noise_multiplier": 9.0,
    }
    trainer, noise = worlds.trainer(
        worlds.vectors, engines.Vmap, torch.float32, accountant="pld", **options
    )
    other, second = worlds.trainer(
        worlds.vectors, engines.Vmap, torch.float32, accountant="pld", **options
    )
    assert trainer.plan.movement == 2
    other.data.train[0][5] = HOSTILE[record][:6]
    for each in (trainer, other):
        each.step.optimizer.param_groups[0]["lr"] = 0.0  # the same weights in both worlds
        list(each.run())
    moves = [worlds.moved(a, b) for a, b in zip(noise.released, second.released)]
    assert sum(move > 1e-6 for move in moves) <= 1
    assert max(moves) <= 2 * LIMIT


def test_an_added_record_can_evict_another_one_from_a_truncated_batch():
    """2 C, not C: with every record drawn and one place too few, one is pushed out."""
    sampler = TruncatedPoisson(sample_rate=1.0, max_batch_size=worlds.SIZE, public_size=worlds.SIZE,
                               key=worlds.KEY)  # fmt: skip
    moves = []
    for step_key in range(8):
        drawn = replace(sampler, expected_batch_size=None, key=bytes([step_key]) * 32)
        results = [
            released(clipping.Flat(1.0), engines.Vmap, extra, sampler=drawn)[1][0]
            for extra in ((), [(torch.linspace(-1, 1, 6) * 1e3, torch.tensor(3))])
        ]
        moves.append(worlds.moved(*results))
    assert max(moves) <= 2 * LIMIT
    assert max(moves) > 1.1


def users_trainer(users, x, physical=3, k=3, rate=1.0):
    sampler = UserPoisson(sample_rate=rate, public_size=4, records_per_user=k, key=worlds.KEY)
    trainer, noise = worlds.trainer(
        worlds.vectors, lambda m, f: engines.Ghost(m, PerUser(cross_entropy)), torch.float32,
        sampler=sampler, physical=physical, users=torch.arange(worlds.SIZE) % 4,
    )  # fmt: skip
    object.__setattr__(trainer.data, "users", users)
    object.__setattr__(trainer.data, "train", (x, torch.arange(len(x)) % 4))
    return trainer, noise


@pytest.mark.parametrize("scale", [1.0, 1e15, float("nan")])
def test_a_whole_user_moves_the_release_by_at_most_c(scale):
    torch.manual_seed(0)
    x = torch.randn(12, 6)
    more = torch.cat([x, torch.randn(7, 6) * scale])
    users = torch.arange(12) % 4
    first, a = users_trainer(users, x)
    second, b = users_trainer(torch.cat([users, torch.full((7,), 9)]), more)
    list(first.run()), list(second.run())
    moved = worlds.moved(a.released[0], b.released[0])
    assert moved <= LIMIT
    assert moved > 0.01 or math.isnan(scale)


@pytest.mark.parametrize("physical", [1, 2, 50])
def test_users_do_not_depend_on_the_physical_batch_size(physical):
    torch.manual_seed(0)
    x, users = torch.randn(12, 6), torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 7, 7])
    first, a = users_trainer(users, x)
    second, b = users_trainer(users, x, physical)
    list(first.run()), list(second.run())
    assert worlds.moved(a.released[0], b.released[0]) < 1e-5


def test_a_users_loss_is_the_mean_over_its_records():
    torch.manual_seed(0)
    x, users = torch.randn(12, 6), torch.tensor([0] * 3 + [1] * 3 + [2] * 3 + [3] * 3)
    trainer, _ = users_trainer(users, x)
    model = trainer.step.engine.model
    y = torch.arange(12) % 4
    per_record = engines.Loop(model, cross_entropy)((x, y)).materialize()
    gradients = {n: g.view(4, 3, *g.shape[1:]).mean(1) for n, g in per_record.items()}
    norms = sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()
    weights = (1 / norms).clamp(max=1)
    expected = {n: torch.tensordot(weights, g, 1) for n, g in gradients.items()}
    trainer.step.accumulate((x.view(4, 3, 6), y.view(4, 3), torch.ones(4, 3, dtype=torch.bool)))
    sums, _ = trainer.step.parallel.total(trainer.step.engine.parameters)
    for name, total in sums.items():
        torch.testing.assert_close(total, expected[name], rtol=1e-5, atol=1e-6)


def test_poisson_under_replace_one_moves_by_two_c():
    trainer, noise = worlds.trainer(
        worlds.vectors, engines.Vmap, torch.float32, adjacency="replace_one", accountant="pld"
    )
    other, second = worlds.trainer(worlds.vectors, engines.Vmap, torch.float32)
    other.data.train[0][3] *= -1e4
    list(trainer.run()), list(other.run())
    assert trainer.plan.movement == 2
    assert worlds.moved(noise.released[0], second.released[0]) <= 2 * LIMIT
    assert isinstance(trainer.plan.sampler, Poisson)


def test_a_step_without_users_is_noise_alone():
    x, users = torch.randn(12, 6), torch.arange(12) % 4
    trainer, noise = users_trainer(users, x, rate=1e-6)
    assert len(trainer.plan.sampler.sample(0, 4)) == 0
    list(trainer.run())
    assert len(noise.released) == 1
    assert all(total.any() for total in noise.released[0].values())
