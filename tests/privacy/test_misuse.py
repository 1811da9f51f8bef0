"""Ways of using the parts that would break the guarantee without anyone noticing."""

import copy
import pickle

import pytest
import torch
import worlds
from cases import squares
from torch import nn

from dpsgd import PrivateStep, accounting, checks, clipping, engines
from dpsgd.noise import Gaussian
from dpsgd.plan import PrivacyPlan
from dpsgd.sampling import Poisson


def make(model, **changes):
    settings = {"noise_multiplier": 1.0, "expected_batch_size": 4.0, **changes}
    return PrivateStep(
        engines.Hooks(model, squares),
        torch.optim.SGD(model.parameters(), lr=1.0),
        clipping=clipping.Flat(1.0),
        noise=Gaussian(),
        **settings,
    )


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_noise_and_its_key_are_not_copied(copying):
    with pytest.raises(ValueError, match="same noise"):
        copying(Gaussian())
    with pytest.raises(ValueError, match="same noise"):
        copying(make(nn.Linear(2, 2))) if copying is not copy.copy else copying(Gaussian())


def test_a_sampler_is_not_pickled_with_its_key():
    with pytest.raises(ValueError, match="key"):
        pickle.dumps(Poisson(sample_rate=0.5))


def test_overlapping_shards_are_refused():
    sums = {"a": torch.zeros(5), "b": torch.zeros(5)}
    with pytest.raises(ValueError, match="share noise"):
        Gaussian().add_(sums, 1.0, 0, offsets={"a": 0, "b": 4})
    Gaussian().add_(sums, 1.0, 0, offsets={"a": 5, "b": 0})


@pytest.mark.parametrize("step", [-1, 0.0, 2**63, "0"])
def test_a_step_that_is_no_step_is_refused(step):
    with pytest.raises(ValueError, match="whole step"):
        Gaussian().add_({"a": torch.zeros(2)}, 1.0, step)


def test_a_plan_cannot_be_run_twice_over():
    trainer, noise = worlds.trainer(worlds.vectors, engines.Hooks, torch.float32, steps=5)
    first, second = trainer.run(), trainer.run()
    reports = [next(first), next(second), *first, *second]
    assert len(noise.released) == 5
    assert sorted(report.step for report in reports) == [1, 2, 3, 4, 5]


def test_releases_outside_the_trainer_count():
    trainer, noise = worlds.trainer(worlds.vectors, engines.Hooks, torch.float32, steps=5)
    run = trainer.run()
    next(run)
    trainer.step.release()
    assert [report.step for report in run] == [3, 4, 5]
    assert len(noise.released) == 5


def test_another_sampler_than_the_accounted_one_is_refused():
    class Everyone:
        sample_rate = 1.0

        def sample(self, step, stop, start=0):
            return torch.arange(10)

    with pytest.raises(ValueError, match="Expected a Sampler, got Everyone"):
        PrivacyPlan(Everyone(), clipping.Flat(1.0), 1, 1.0, 1e-5)


def test_no_gradient_but_the_private_ones_is_stepped():
    model = nn.Linear(3, 2)
    step = make(model)
    model.bias.requires_grad_(False)
    kept = model.bias.clone()
    model.bias.grad = torch.ones(2)
    model.weight.grad = torch.full((2, 3), 1e6)
    step.release()
    assert torch.equal(model.bias, kept)
    assert model.weight.abs().max() < 100


def test_unfreezing_within_a_step_spends_no_noise():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    step = make(model)
    step.accumulate(torch.randn(4, 3))
    model.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="no noise was spent"):
        step.release()
    assert step.step == 0
    step.release()


@pytest.mark.parametrize("bound", [5e-7, 1e-3, 1.0])
def test_a_norm_that_float32_cannot_scale_down_weighs_nothing(bound):
    model = nn.Linear(3, 1, bias=False)
    grads = engines.Hooks(model, lambda m, b: m(b)[:, 0])(torch.tensor([[2e38, 1.0, 0.0]]))
    weights = clipping.Flat(bound)(grads.norms())
    assert grads.weighted_sum(weights)["weight"].norm() <= bound * (1 + 1e-5)


@pytest.mark.parametrize("bound", [1e-45, 1e39])
def test_a_bound_outside_what_float32_can_add_is_refused(bound):
    with pytest.raises(ValueError, match="max_grad_norm"):
        clipping.Flat(bound)


@pytest.mark.parametrize("seed", range(6))
def test_coupling_through_one_extreme_sample_is_found(seed):
    torch.manual_seed(seed)

    class ByLargest(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x / x.abs().amax())

    with pytest.raises(ValueError, match="independent samples"):
        checks.check_independence(ByLargest(), squares, torch.rand(4, 3))


def test_sorting_by_length_is_found_on_the_synthetic_batch():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(1000, 4)
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            order = (x != 0).sum(1).argsort(descending=True, stable=True)
            return self.layer(self.embedding(x)[order]).tanh().mean(1)[order.argsort()]

    from dpsgd.data import synthetic

    data = synthetic("tokens", (12,), 2, 50, num_train=50, vocab_size=1000)
    batch = checks.synthetic_batch(data, 4)
    lengths = (batch[0] != 0).sum(1).tolist()
    assert lengths != sorted(lengths, reverse=True)
    engine = engines.Hooks(Sorted(), lambda model, b: squares(model, b[0]))
    with pytest.raises(ValueError, match=r"wrong per-sample|differ by"):
        checks.preflight(engine, batch)


@pytest.mark.parametrize("noise", [1e-9, 1e-4])
def test_hardly_any_noise_is_infinite_epsilon_not_an_overflow(noise):
    plan = {"sample_rate": 0.5, "num_steps": 3, "delta": 1e-5}
    assert accounting.epsilon(noise_multiplier=noise, **plan) == float("inf")


@pytest.mark.parametrize("rate", [1e-300, 1e-12])
def test_calibration_at_a_tiny_rate_gives_some_noise(rate):
    noise = accounting.calibrate_noise_multiplier(
        target_epsilon=1, sample_rate=rate, num_steps=3, delta=1e-5
    )
    assert noise >= 0.05
