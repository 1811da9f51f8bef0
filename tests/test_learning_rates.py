"""Tables of learning rates."""

import math
import warnings
from functools import partial

import pytest
import torch
import worlds
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

from dpsgd import engines, learning_rates
from dpsgd.recipe import Recipe
from dpsgd.trainer import Trainer


def optimizer(kind=torch.optim.SGD, **options):
    return kind([torch.nn.Parameter(torch.zeros(1))], lr=2.0, **options)


def rates(schedule, steps=10, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = partial(schedule, num_steps=steps, **options)
        table = learning_rates.tabulated(made, optimizer(), steps)
    assert len(table) == steps
    return [row["lr"] for row in table]


def test_constant_rates_with_a_linear_rise():
    assert rates(learning_rates.constant) == [2.0] * 10
    expected = [2 / 3, 4 / 3, 2, 2, 2, 2, 2, 2, 2, 2]
    assert rates(learning_rates.constant, warmup=0.3) == pytest.approx(expected)


def test_half_a_cosine():
    found = rates(learning_rates.cosine, least=0.1)
    expected = [0.2 + 0.9 * (1 + math.cos(math.pi * t / 10)) for t in range(10)]
    assert found == pytest.approx(expected)


def test_a_straight_line_to_zero():
    assert rates(learning_rates.linear) == pytest.approx([2 - 0.2 * t for t in range(10)])


def test_milestones():
    found = rates(learning_rates.milestones, at=[0.5, 0.8], factor=0.5)
    assert found == pytest.approx([2] * 5 + [1] * 3 + [0.5] * 2)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("schedule", [learning_rates.cosine, learning_rates.linear])
def test_short_runs_have_rates_too(schedule, steps):
    assert all(0 < rate <= 2 for rate in rates(schedule, steps, warmup=0.5))


def test_any_scheduler_of_torch_with_whatever_it_changes():
    table = learning_rates.tabulated(
        lambda o: OneCycleLR(o, max_lr=1.0, total_steps=5), optimizer(momentum=0.9), 5
    )
    real = optimizer(momentum=0.9)
    scheduler = OneCycleLR(real, max_lr=1.0, total_steps=5)
    for row in table:
        group = real.param_groups[0]
        assert row == {"lr": group["lr"], "momentum": group["momentum"]}
        real.step()
        if row is not table[-1]:
            scheduler.step()
    adam = learning_rates.tabulated(lambda o: ExponentialLR(o, 0.5), optimizer(torch.optim.Adam), 3)
    assert [row["lr"] for row in adam] == [2, 1, 0.5]


@pytest.mark.parametrize("factor", [-1.0, float("nan"), 1e200])
def test_rates_that_no_optimizer_takes_are_refused(factor):
    with pytest.raises(ValueError, match="finite learning rates >= 0"):
        learning_rates.tabulated(lambda o: ExponentialLR(o, factor), optimizer(), 4)


def test_what_is_no_such_scheduler_is_refused():
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        learning_rates.tabulated(ReduceLROnPlateau, optimizer(), 3)
    with pytest.raises(ValueError, match="schedule of 8 steps"):
        learning_rates.tabulated(lambda o: OneCycleLR(o, 1.0, total_steps=5), optimizer(), 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup": 1.0}, "warmup"),
        ({"least": 2.0}, "least"),
    ],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        rates(learning_rates.cosine, **options)


def test_a_trainer_steps_with_the_rates_of_its_table_also_from_the_middle():
    table = learning_rates.tabulated(lambda o: CosineAnnealingLR(o, 6), optimizer(), 6)
    made, _ = worlds.trainer(worlds.vectors, engines.Ghost, torch.float32, steps=6)
    trainer = Trainer(made.step, made.data, made.plan, physical_batch_size=5,
                      recipe=Recipe(rates=table))  # fmt: skip
    seen = [report.learning_rate for report in trainer.run(until=2)]
    trainer.step.optimizer.param_groups[0]["lr"] = 99.0
    seen += [report.learning_rate for report in trainer.run()]
    assert seen == [row["lr"] for row in table]
