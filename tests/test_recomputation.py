"""Activation checkpointing: the same numbers from less memory, and the model as it was."""

import copy
import pickle

import pytest
import torch
from cases import ENGINES
from memory import saved_bytes
from torch import nn

from dpsgd import engines, losses, models
from dpsgd.checks import preflight
from dpsgd.precision import Autocast
from dpsgd.recomputation import Recomputed

CAN = {"loop": engines.Loop, "ghost": engines.Ghost, "hooks": engines.Hooks}
BUILD = {
    "transformer": lambda: models.Transformer((6, 5), 3, width=8, heads=2, depth=3, dropout=0.2),
    "wide_resnet": lambda: models.WideResNet((1, 6, 5), 3, depth=10, width=1),
    "mlp": lambda: models.MLP((6, 5), 3, dropout=0.2),
    "lstm": lambda: models.LSTM((6, 5), 3),
}


def batch(name, dtype=torch.float64):
    shape = (4, 1, 6, 5) if name == "wide_resnet" else (4, 6, 5)
    return torch.randn(shape, dtype=dtype), torch.arange(4) % 3


def gradients(engine, model, loss, data):
    torch.manual_seed(3)
    grads = engine(model, loss)(data)
    return grads.norms(), grads.weighted_sum(torch.linspace(0.5, 1, 4))


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("engine", CAN)
def test_gradients_are_those_of_the_loop_without(engine, name):
    if (engine, name) == ("hooks", "lstm"):
        pytest.skip("has no rule for it, checkpoints or not")
    model, data = BUILD[name]().double().eval(), batch(name)
    expected = gradients(engines.Loop, model, losses.cross_entropy, data)
    actual = gradients(CAN[engine], model, Recomputed(losses.cross_entropy), data)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["transformer", "mlp"])
@pytest.mark.parametrize("engine", CAN)
def test_what_is_dropped_is_dropped_again(engine, name):
    """Each engine against itself, on the same random numbers."""
    model, data = BUILD[name]().double().train(), batch(name)
    expected = gradients(CAN[engine], model, losses.cross_entropy, data)
    actual = gradients(CAN[engine], model, Recomputed(losses.cross_entropy), data)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name not in CAN])
def test_other_engines_refuse(engine):
    model, data = BUILD["transformer"]().double().eval(), batch("transformer")
    with pytest.raises(ValueError, match=r"cannot run this model|wrong per-sample gradients"):
        ENGINES[engine](model, Recomputed(losses.cross_entropy))(data)


@pytest.mark.parametrize("engine", CAN)
def test_they_run_under_autocast(engine):
    model, data = BUILD["transformer"]().eval(), batch("transformer", torch.float32)
    plain = gradients(CAN[engine], model, Autocast(losses.cross_entropy), data)
    loss = Autocast(Recomputed(losses.cross_entropy))
    torch.testing.assert_close(gradients(CAN[engine], model, loss, data), plain)


def test_the_preflight_passes():
    model = BUILD["transformer"]().train()
    engine = engines.Ghost(model, Recomputed(losses.cross_entropy))
    assert preflight(engine, batch("transformer", torch.float32)).routes


def test_a_forward_pass_keeps_the_inputs_of_blocks_only():
    model = models.Transformer((32, 8), 3, width=32, heads=2, depth=8)
    data = torch.randn(16, 32, 8), torch.arange(16) % 3
    plain, less = losses.cross_entropy, Recomputed(losses.cross_entropy)
    assert saved_bytes(model, less, data) < 0.4 * saved_bytes(model, plain, data)


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))

    def forward(self, x):
        self.blocks(x)
        raise RuntimeError("out of ideas")


@pytest.mark.parametrize("engine", CAN)
def test_the_model_is_as_it_was(engine):
    model = BUILD["transformer"]().double()
    before = [set(vars(module)) for module in model.modules()]
    names = list(model.state_dict())
    gradients(CAN[engine], model, Recomputed(losses.cross_entropy), batch("transformer"))
    assert [set(vars(module)) for module in model.modules()] == before
    assert list(model.state_dict()) == names
    assert torch.equal(pickle.loads(pickle.dumps(model)).head.weight, model.head.weight)
    assert copy.deepcopy(model).blocks[0].forward.__self__ is not model.blocks[0]


def test_the_model_is_as_it_was_after_an_error():
    model = Raises()
    with pytest.raises(RuntimeError, match="ideas"):
        Recomputed(losses.cross_entropy)(model, (torch.zeros(2, 5), torch.zeros(2).long()))
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_forward_of_the_users_own_is_put_back():
    model = models.MLP((5,), 3)
    layer, calls = model.hidden[0], []
    plain = layer.forward
    layer.forward = own = lambda x: (calls.append(1), plain(x))[1]
    engines.Loop(model, Recomputed(losses.cross_entropy))((torch.randn(1, 5), torch.tensor([1])))
    assert layer.forward is own
    assert len(calls) == 2


@pytest.mark.hf
def test_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=8)
    ).double()
    ids = torch.randint(11, (4, 6))
    for mode in (True, False):
        model.train(mode)
        expected = gradients(engines.Ghost, model, losses.causal_lm, ids)
        actual = gradients(engines.Ghost, model, Recomputed(losses.causal_lm), ids)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
