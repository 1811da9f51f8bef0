"""Averages of the weights: tested and saved, never trained."""

import pytest
import torch
import worlds

from dpsgd import engines
from dpsgd.averaging import averaged, update_average
from dpsgd.recipe import Recipe
from dpsgd.trainer import Trainer


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_the_average_is_the_published_one(kind):
    """By hand: d_t = min(decay, (1 + t) / (10 + t)); the trained weights are left alone."""
    model = torch.nn.Linear(3, 2).double()
    optimizer, expected = kind(model.parameters(), lr=0.1), None
    for step in range(1, 30):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        now = weights_of(model)
        update_average(optimizer, model.parameters(), 0.7, step)
        d = min(0.7, (1 + step) / (10 + step))
        expected = now if expected is None else [d * a + (1 - d) * w for a, w in zip(expected, now)]
    with averaged(optimizer, model.parameters()):
        torch.testing.assert_close(weights_of(model), expected, rtol=1e-12, atol=0)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), now))


def test_own_weights_come_back_after_an_error():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    update_average(optimizer, model.parameters(), 0.9, 1)
    with torch.no_grad():
        model.weight += 1
    before = weights_of(model)
    with pytest.raises(RuntimeError), averaged(optimizer, model.parameters()):
        raise RuntimeError
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before))


def trainer(decay, steps=8):
    made, _ = worlds.trainer(worlds.vectors, engines.Ghost, torch.float64, rate=0.7, steps=steps)
    object.__setattr__(made.data, "train", (made.data.train[0].double(), made.data.train[1]))
    return Trainer(made.step, made.data, made.plan, physical_batch_size=5, seed=0,
                   recipe=Recipe(ema_decay=decay))  # fmt: skip


def test_training_is_the_same_with_and_without_an_average():
    found = []
    for decay in (None, 0.9):
        made = trainer(decay)
        list(made.run())
        found.append(weights_of(made.step.engine.model))
    assert all(torch.equal(p, q) for p, q in zip(*found))
    with made.weights_to_publish():
        published = weights_of(made.step.engine.model)
    assert not any(torch.equal(p, q) for p, q in zip(published, found[1]))


def test_a_state_takes_the_average_along():
    whole = trainer(0.9)
    list(whole.run())
    first, second = trainer(0.9), trainer(0.9)
    list(first.run(until=4))
    second.step.load_state_dict(first.step.state_dict())
    list(second.run())
    with whole.weights_to_publish(), second.weights_to_publish():
        for p, q in zip(
            whole.step.engine.parameters.values(), second.step.engine.parameters.values()
        ):
            assert torch.equal(p, q)


def test_a_run_that_goes_on_without_an_average_publishes_its_own_weights():
    """The average that the steps before have left is neither tested nor saved."""
    first, second = trainer(0.9), trainer(None)
    list(first.run(until=4))
    second.step.load_state_dict(first.step.state_dict())
    for steps in (4, 8):  # before the first step of its own, and after some
        list(second.run(until=steps))
        own = weights_of(second.step.engine.model)
        with second.weights_to_publish():
            assert all(map(torch.equal, weights_of(second.step.engine.model), own))


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_senseless_decay_is_refused(decay):
    with pytest.raises(ValueError, match="ema_decay"):
        Recipe(ema_decay=decay)
