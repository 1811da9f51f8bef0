"""`PrivateStep`: the algorithm as an object."""

import pytest
import torch
from cases import squares
from torch import nn

from dpsgd import PrivateStep, clipping, engines
from dpsgd.noise import Gaussian


def make(model=None, optimizer=None, engine=engines.Vmap, **changes):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double() if model is None else model
    settings = {
        "clipping": clipping.Flat(0.5),
        "noise": Gaussian(bytes(32)),
        "noise_multiplier": 0.0,
        "expected_batch_size": 8.0,
        **changes,
    }
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    return PrivateStep(engine(model, squares), optimizer, **settings)


def data(size=5):
    return torch.randn(size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_a_step_is_the_formula():
    """p <- p - lr / B_expected * (sum_i min(1, C / |g_i|) g_i + sigma C z)."""
    step = make(noise_multiplier=1.5)
    model = step.engine.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = engines.Loop(model, squares)(data()).materialize()
    norms = torch.cat([g.flatten(1) for g in grads.values()], 1).norm(dim=1)
    noise = {name: torch.zeros_like(p) for name, p in before.items()}
    Gaussian(bytes(32)).add_(noise, 1.5 * 0.5, step=0)
    step(data())
    for name, p in model.named_parameters():
        clipped = torch.einsum("b,b...->...", (0.5 / norms).clamp(max=1), grads[name])
        torch.testing.assert_close(p, before[name] - (clipped + noise[name]) / 8)


def test_physical_batches_add_up():
    whole, parts = make(), make()
    whole(data(5))
    parts.accumulate(data(5)[:2])
    parts.accumulate(data(5)[2:])
    parts.release()
    for p, q in zip(whole.engine.model.parameters(), parts.engine.model.parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("held", [(float("nan"), 1e300), (0.5, -2.0), (0.0, 0.0)])
@pytest.mark.parametrize("mask", [[1, 1, 0, 1, 0], [True, True, False, True, False]])
def test_the_mask_silences_padding_whatever_it_holds(mask, held):
    """Masks keep the gradients of unmasked samples, even beside NaN."""
    padded, plain = make(), make()
    x = data(5)
    plain(x[[0, 1, 3]])
    x[2], x[4] = held
    contribution = padded.accumulate(x, torch.tensor(mask))
    padded.release()
    assert contribution.weights[2] == contribution.weights[4] == 0
    for p, q in zip(plain.engine.model.parameters(), padded.engine.model.parameters()):
        torch.testing.assert_close(p, q)


def test_release_without_samples_is_noise_alone():
    step = make(noise_multiplier=2.0)
    before = step.engine.model.weight.detach().clone()
    step.release()
    expected = {n: torch.zeros_like(p) for n, p in step.engine.model.named_parameters()}
    Gaussian(bytes(32)).add_(expected, 1.0, step=0)
    torch.testing.assert_close(step.engine.model.weight, before - expected["weight"] / 8)


def test_each_release_uses_the_noise_of_its_own_step():
    step = make(noise_multiplier=1.0)
    gradients = []
    for _ in range(3):
        step.release()
        gradients.append(step.engine.model.weight.grad.clone())
    assert not torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[1], gradients[2])


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop]
)
def test_any_optimizer_gets_the_private_gradient_unmodified(kind):
    private, plain = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    plain.load_state_dict(private.state_dict())
    step = make(private, kind(private.parameters(), lr=0.1))
    optimizer = kind(plain.parameters(), lr=0.1)
    for _ in range(3):
        step(data())
        for p, q in zip(private.parameters(), plain.parameters()):
            q.grad = p.grad.clone()
        optimizer.step()
    for p, q in zip(private.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q)


def test_an_error_discards_the_sums_of_the_step():
    step = make()
    step.accumulate(data())
    with pytest.raises(ValueError, match="one batch size"):
        step.accumulate((data(3), data(4)))
    step.release()
    assert torch.equal(step.engine.model.weight.grad, torch.zeros(3, 4).double())


def test_a_whole_step_amid_an_unfinished_one_is_refused():
    step = make()
    step.accumulate(data())
    with pytest.raises(ValueError, match="under way"):
        step(data())
    step.discard()
    step(data())


@pytest.mark.parametrize("mask", [torch.ones(4), torch.full((5,), 0.5), torch.full((5,), 2.0)])
def test_a_mask_that_is_not_one_is_refused(mask):
    with pytest.raises(ValueError, match="mask"):
        make().accumulate(data(), mask)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier"),
        ({"expected_batch_size": 0.0}, "expected_batch_size"),
        ({"expected_batch_size": float("inf")}, "expected_batch_size"),
    ],
)
def test_senseless_numbers_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)


def test_an_optimizer_that_does_not_own_the_parameters_is_refused():
    model = nn.Linear(4, 3).double()
    with pytest.raises(ValueError, match=r"lacks \['weight'\]"):
        make(model, torch.optim.SGD([model.bias], lr=1.0))
    with pytest.raises(ValueError, match="engine's model only"):
        make(model, torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], lr=1.0))
    with pytest.raises(ValueError, match="LBFGS"):
        make(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match=r"torch\.optim optimizer"):
        make(model, "sgd")


def test_frozen_parameters_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    model[0].requires_grad_(False)
    kept = model[0].weight.clone()
    step = make(model, torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=1.0)
    step(data())
    assert torch.equal(model[0].weight, kept)
    assert model[0].weight.grad is None


def test_bfloat16_parameters_are_summed_and_noised_in_float32():
    model = nn.Linear(4, 3).bfloat16()
    step = make(model, noise_multiplier=1.0)
    step(data().bfloat16())
    assert model.weight.dtype == model.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("engine", [engines.Loop, engines.Vmap, engines.Ghost])
@pytest.mark.parametrize("tracked", [True, False])
def test_batch_statistics_are_refused_whatever_the_engine(engine, tracked):
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3, track_running_stats=tracked)
    )
    step = PrivateStep(
        engine(model, lambda m, b: m(b).sum(1)),
        torch.optim.SGD(model.parameters(), lr=0.1),
        clipping=clipping.Flat(1.0),
        noise=Gaussian(),
        noise_multiplier=1.0,
        expected_batch_size=4,
    )
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\).*replace_batch_norm"):
        step(torch.randn(4, 4))
    assert tracked is False or not model[1].running_mean.any()


def test_gradients_that_somebody_holds_are_not_written_into():
    """The memory of a step's sums is used again, but only if nobody could see it half-made."""
    step = make(noise_multiplier=1.0)
    model = step.engine.model
    step(data())
    held = model.weight.grad
    row, array = model.bias.grad[1:], model.bias.grad.detach().numpy()
    before = held.clone(), row.clone(), array.copy()
    for _ in range(3):
        step(data())
    assert torch.equal(held, before[0])
    assert torch.equal(row, before[1])
    assert (array == before[2]).all()


def test_a_storage_that_somebody_holds_is_not_written_into():
    step = make(noise_multiplier=1.0)
    step(data())
    before = step.engine.model.weight.grad.clone()
    storage = step.engine.model.weight.grad.untyped_storage()
    for _ in range(3):
        step(data())
    held = torch.tensor([], dtype=before.dtype).set_(storage)[: before.numel()]
    assert torch.equal(held, before.flatten())


def test_the_memory_of_sums_is_used_again():
    step = make(noise_multiplier=1.0)
    places = set()
    for _ in range(4):
        step(data())
        places.add(step.engine.model.weight.grad.data_ptr())
    assert len(places) == 1


def test_a_discarded_step_leaves_nothing_in_the_memory_of_the_next():
    clean, spoilt = make(noise_multiplier=1.0), make(noise_multiplier=1.0)
    spoilt.accumulate(1e3 * data())
    spoilt.discard()
    for step in (clean, spoilt):
        step(data())
    for p, q in zip(clean.engine.model.parameters(), spoilt.engine.model.parameters()):
        assert torch.equal(p, q)


def test_parameters_of_two_precisions_share_a_step():
    model = nn.Sequential(nn.Linear(4, 3).double(), nn.Linear(3, 2).double())
    model[1].bias.data = model[1].bias.data.float()
    loss = lambda m, b: (m[0](b) @ m[1].weight.T + m[1].bias.double()).square().sum(1)  # noqa: E731
    step = PrivateStep(
        engines.Ghost(model, loss),
        torch.optim.SGD(model.parameters(), lr=1.0),
        clipping=clipping.Flat(0.5),
        noise=Gaussian(bytes(32)),
        noise_multiplier=1.0,
        expected_batch_size=8.0,
    )
    for _ in range(2):
        step(data())
    assert model[1].bias.grad.dtype == torch.float32
    assert model[1].weight.grad.dtype == torch.float64


def test_a_state_is_of_its_moment_and_comes_back_whole():
    step = make()
    momentum = torch.optim.SGD(step.engine.model.parameters(), lr=0.1, momentum=0.9)
    step = make(model=step.engine.model, optimizer=momentum, noise_multiplier=1.0)
    step(data())
    state = step.state_dict()
    weights = [p.detach().clone() for p in step.engine.model.parameters()]
    step(data())
    assert step.step == 2
    step.load_state_dict(state)
    assert step.step == 1
    for now, before in zip(step.engine.model.parameters(), weights, strict=True):
        assert torch.equal(now, before)
    with pytest.raises(ValueError, match="The noise of step 1 has been used"):
        step(data())  # the same Gaussian does not give its noise twice
    with pytest.raises(ValueError, match="state of this model"):
        step.load_state_dict({**state, "model": {}})
