"""What once gave wrong numbers without an error: each is exact now, or refused."""

import contextlib
import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from cases import ENGINES, squares
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpsgd import PrivateStep, clipping, engines
from dpsgd.noise import Gaussian

CLASSES = [engines.Loop, engines.Ghost, engines.Hooks, engines.Vmap]


def batch(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def agree(model, engine, x, loss=squares):
    expected = engines.Loop(model, loss)(x).materialize()
    torch.testing.assert_close(engine(model, loss)(x).materialize(), expected)


@pytest.mark.parametrize("engine", [engines.Ghost, engines.Hooks, engines.Vmap])
def test_a_module_registered_twice_keeps_its_parameters_and_learns(engine):
    shared = nn.Linear(3, 3)
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Tanh(), shared).double()
    agree(model, engine, batch(4, 3))
    assert isinstance(shared.weight, nn.Parameter)
    before = shared.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = PrivateStep(
        engine(model, squares),
        optimizer,
        clipping=clipping.Flat(1.0),
        noise=Gaussian(),
        noise_multiplier=0.0,
        expected_batch_size=4,
    )
    step(batch(4, 3))
    assert not torch.equal(shared.weight, before)
    pickle.dumps(copy.deepcopy(model))


@pytest.mark.parametrize("engine", list(ENGINES.values()), ids=list(ENGINES))
def test_a_refused_model_still_has_its_own_parameters(engine):
    shared = nn.Linear(3, 3)
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Tanh(), shared).double()
    parameters = list(model.parameters())
    with contextlib.suppress(ValueError):  # Opacus refuses in some modes
        engine(model, squares)(batch(4, 3))
    assert all(p is q for p, q in zip(parameters, model.parameters()))
    model(batch(4, 3)).sum().backward()


@pytest.mark.parametrize("engine", [engines.Ghost, engines.Hooks, engines.Vmap])
def test_two_threads_on_one_model(engine):
    model = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 2)).double()
    x = batch(6, 3)
    expected = engines.Loop(model, squares)(x).norms()
    wrong = []

    def work():
        run = engine(model, squares)
        for _ in range(20):
            if not torch.allclose(run(x).norms(), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(isinstance(p, nn.Parameter) for p in (model[0].weight, model[2].bias))


class Flipped(nn.Module):
    """Runs its layer on the batch in another order, and puts the order back."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x.flip(0)).flip(0)


@pytest.mark.parametrize("name", [n for n in ENGINES if not n.startswith(("ghost", "vmap"))])
def test_samples_in_another_order_are_noticed(name):
    with pytest.raises(ValueError, match="wrong per-sample gradients"):
        ENGINES[name](Flipped().double(), squares)(batch(4, 3))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)
        self.reentrant = reentrant

    def forward(self, x):
        x = x.detach().requires_grad_()
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("engine", CLASSES)
def test_reentrant_checkpoints_are_refused(engine):
    with pytest.raises(ValueError, match=r"reentrant|cannot run"):
        engine(Checkpointed(True).double(), squares)(batch(4, 3))


def test_the_other_checkpoints_are_exact():
    agree(Checkpointed(False).double(), engines.Hooks, batch(4, 3))


def test_a_parameter_reached_by_reference_is_noticed():
    class Reference(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.kept = (self.layer.weight,)

        def forward(self, x):
            return F.linear(self.layer(x), self.kept[0])

    for engine, words in ((engines.Vmap, "closure"), (engines.Hooks, "outside the forward")):
        with pytest.raises(ValueError, match=words):
            engine(Reference().double(), squares)(batch(4, 3))


def test_one_parameter_under_several_names_of_its_modules():
    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.first.again = self.first.weight
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x)) @ self.first.again

    model = Names().double()
    agree(model, engines.Vmap, batch(4, 3))
    assert model.first.again is model.first.weight is model.second.weight


def test_settings_that_change_during_the_forward_are_those_of_each_call():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 2)

        def forward(self, x):
            self.conv.dilation = (1,)
            first = self.conv(x)
            self.conv.dilation = (2,)
            return first[..., :3] + self.conv(x)[..., :3]

    agree(Changing().double(), engines.Hooks, batch(3, 2, 6))


def test_a_mode_that_changes_nothing_may_change():
    def loss(model, x):
        model.eval()
        out = squares(model, x)
        model.train()
        return out

    agree(nn.Linear(3, 2).double(), engines.Hooks, batch(4, 3), loss)


@pytest.mark.parametrize("engine", [engines.Ghost, engines.Hooks, engines.Vmap, engines.Opacus])
def test_hooks_on_parameters_are_refused(engine):
    model = nn.Linear(3, 2).double()
    model.weight.register_hook(lambda grad: grad * 0)
    with pytest.raises(ValueError, match="tensor hooks"):
        engine(model, squares)(batch(4, 3))
    assert not engines.Loop(model, squares)(batch(4, 3)).materialize()["weight"].any()


@pytest.mark.parametrize("engine", CLASSES)
def test_inference_mode_outside_changes_nothing(engine):
    model = nn.Linear(3, 2).double()
    expected = engines.Loop(model, squares)(batch(4, 3)).norms()
    with torch.inference_mode():
        torch.testing.assert_close(engine(model, squares)(batch(4, 3)).norms(), expected)


def test_opacus_ghost_says_when_a_step_has_outdated_its_gradients():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    grads = engines.Opacus(model, squares, mode="ghost")(batch(4, 3))
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(ValueError, match="before the step"):
        grads.weighted_sum(torch.ones(4))


def test_a_loss_module_is_explained():
    with pytest.raises(ValueError, match=r"loss_fn\(model, batch\)"):
        engines.Vmap(nn.Linear(3, 2), nn.CrossEntropyLoss())


def test_layers_without_features_are_no_error():
    agree(nn.Linear(0, 3).double(), engines.Hooks, torch.zeros(4, 0, dtype=torch.float64))


def test_representations_say_what_they_are():
    run = engines.Vmap(nn.Linear(3, 2).double(), squares)
    assert repr(run) == "Vmap(Linear)"
    assert repr(run(batch(4, 3))) == "DenseGrads(samples=4, parameters=2)"


@pytest.mark.parametrize("first", ["equal", "nan"])
def test_a_first_batch_that_tells_nothing_is_not_taken_for_a_check(first):
    rows = torch.ones(4, 3) if first == "equal" else torch.full((4, 3), float("nan"))
    engine = engines.Hooks(Flipped().double(), squares)
    with contextlib.suppress(ValueError):
        engine(rows.double())
    with pytest.raises(ValueError, match="wrong per-sample gradients"):
        engine(batch(4, 3))
