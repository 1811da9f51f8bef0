"""Autocast and parameters in bfloat16: what is rounded, and what must not be."""

import json

import pytest
import torch
import worlds
from cases import ENGINES
from command_line import command
from torch import nn

from dpsgd import clipping, engines, losses, models
from dpsgd.checks import preflight
from dpsgd.data import Dataset
from dpsgd.evaluate import evaluate
from dpsgd.noise import Gaussian
from dpsgd.precision import Autocast, with_autocast
from dpsgd.private_step import PrivateStep

ALL = {"loop": engines.Loop, **ENGINES}
REFUSES = {"opacus-ghost": "exceed the clip norm", "opacus-ew": "cannot run this model"}
AUTOCAST = [name for name in ALL if name not in REFUSES]
BFLOAT16 = [name for name in ALL if name != "opacus-ghost"]
LOSS = Autocast(losses.cross_entropy)
CLOSE = {"rtol": 0.05, "atol": 0.02}
"""Roundings to 8 bits on a way of a few layers, in another order in every engine."""

BUILD = {
    "cnn": lambda: (models.CNN((1, 6, 6), 4), torch.randn(8, 1, 6, 6)),
    "transformer": lambda: (
        models.Transformer((6, 6), 4, width=16, heads=2),
        torch.randn(8, 6, 6),
    ),
    "mlp": lambda: (models.MLP((6, 6), 4), torch.randn(8, 6, 6)),
}


def made(name, dtype=torch.float32):
    model, x = BUILD[name]()
    return model.to(dtype), (x.to(dtype), torch.arange(8) % 4)


def check_agreement(engine, model, loss, data):
    weights = torch.linspace(0.5, 1, 8)
    expected, actual = engines.Loop(model, loss)(data), ALL[engine](model, loss)(data)
    assert actual.norms().dtype == torch.float32
    torch.testing.assert_close(actual.norms(), expected.norms(), **CLOSE)
    sums, reference = actual.weighted_sum(weights), expected.weighted_sum(weights)
    scale = torch.stack([total.norm() for total in reference.values()]).norm()
    for name, total in sums.items():
        assert total.dtype == torch.float32
        assert (total - reference[name]).norm() < 0.02 * scale


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("engine", AUTOCAST)
def test_engines_agree_under_autocast(engine, name):
    check_agreement(engine, *_with_loss(made(name), LOSS))


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("engine", BFLOAT16)
def test_engines_agree_on_parameters_in_bfloat16(engine, name):
    check_agreement(engine, *_with_loss(made(name, torch.bfloat16), losses.cross_entropy))


def _with_loss(model_and_data, loss):
    model, data = model_and_data
    return model, loss, data


@pytest.mark.parametrize("engine", REFUSES)
def test_engines_that_cannot_refuse_autocast(engine):
    model, data = made("mlp")
    with pytest.raises(ValueError, match=REFUSES[engine]):
        ALL[engine](model, LOSS)(data)


@pytest.mark.parametrize("engine", AUTOCAST)
def test_the_forward_pass_is_in_bfloat16(engine):
    model, data = made("mlp")
    seen = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    ALL[engine](model, LOSS)(data)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("engine", ["ghost", "hooks", "vmap"])
@pytest.mark.parametrize("name", BUILD)
def test_the_preflight_passes_under_autocast(engine, name):
    model, data = made(name)
    assert preflight(ALL[engine](model.train(), LOSS), data).routes


def test_hooks_still_refuse_what_is_wrong_under_autocast():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(36, 4)

        def forward(self, x):
            return self.layer(x.flatten(1)) + x.flatten(1) @ self.layer.weight.T

    _, data = made("mlp")
    with pytest.raises(ValueError, match=r"outside the forward|wrong per-sample"):
        engines.Hooks(Functional(), LOSS)(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("engine", AUTOCAST)
def test_many_small_samples_add_up(engine, dtype):
    """In bfloat16 a sum stops growing at 256 times its terms; 4096 are added here."""
    model = nn.Linear(2, 1, bias=False).to(dtype)

    def loss(model, x):
        return model(x).float().sum(1)

    x = torch.ones(4096, 2, dtype=dtype)
    grads = ALL[engine](model, Autocast(loss) if dtype == torch.float32 else loss)(x)
    norms = grads.norms()
    torch.testing.assert_close(norms, torch.full_like(norms, 2**0.5), rtol=1e-6, atol=0)
    total = grads.weighted_sum(torch.full((4096,), 1 + 2**-12))["weight"]
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, torch.full((1, 2), 4097.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("engine", BFLOAT16)
def test_physical_batches_of_bfloat16_add_up(engine):
    """The sum of 600 batches of one row each: it is kept in float32 between them."""
    model = nn.Linear(2, 1, bias=False).bfloat16()
    step = private_step(ALL[engine](model, lambda m, x: m(x).float().sum(1)), 0.0, 600)
    for _ in range(600):
        step.accumulate(torch.full((1, 2), 0.5, dtype=torch.bfloat16))
    step.release()
    assert model.weight.grad.dtype == torch.bfloat16
    assert model.weight.grad.tolist() == [[0.5, 0.5]]


def private_step(engine, noise_multiplier, expected=1.0):
    return PrivateStep(
        engine,
        torch.optim.SGD(engine.model.parameters(), lr=0.0),
        clipping=clipping.Flat(1.0),
        noise=Gaussian(worlds.KEY),
        noise_multiplier=noise_multiplier,
        expected_batch_size=expected,
    )


def test_noise_is_added_before_the_gradient_is_rounded():
    """The gradient is the sum in float32 plus the noise in float32, rounded once."""
    model = nn.Linear(64, 64).bfloat16()
    noise = worlds.Recorded(worlds.KEY)
    step = private_step(engines.Ghost(model, lambda m, x: m(x).float().sum(1)), 1.0, 3.0)
    step.noise = noise
    step(torch.randn(5, 64).bfloat16())
    (released,) = noise.released
    assert {total.dtype for total in released.values()} == {torch.float32}
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, (released[name] / 3.0).bfloat16())
        assert (released[name].bfloat16() != released[name]).float().mean() > 0.9


def test_evaluation_is_under_autocast_too():
    model, (x, y) = made("mlp")
    seen = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    data = Dataset((x, y), (x, y), (6, 6), 4, 8)
    for loss in (LOSS, losses.PerUser(LOSS)):
        results = evaluate(model, loss, data)
        assert set(results) == {"test_loss", "test_accuracy"}
    assert len(seen) == 4
    assert set(seen) == {torch.bfloat16}


def test_gradients_of_a_weight_used_often_are_added_up_in_float32():
    """With the cache of autocast they would be added up in bfloat16."""
    model = nn.Linear(1, 1, bias=False)

    def loss(model, x):
        return sum(model(x[:, i : i + 1]).float().sum(1) for i in range(x.shape[1]))

    x = torch.ones(1, 600)
    grads = engines.Loop(model, Autocast(loss))(x).materialize()["weight"]
    assert float(grads) == 600


@pytest.mark.parametrize(
    ("autocast", "dtype", "words"),
    [
        ("float16", torch.float32, "losses to be scaled"),
        ("float8", torch.float32, "autocast=bfloat16 or null"),
        ("bfloat16", torch.bfloat16, "dtype=float32 with autocast"),
        ("bfloat16", torch.float64, "dtype=float32 with autocast"),
    ],
)
def test_what_autocast_may_be(autocast, dtype, words):
    with pytest.raises(ValueError, match=words):
        with_autocast(losses.mse, autocast, dtype)


def slow(*arguments):
    return pytest.param(arguments, marks=pytest.mark.slow)


SHORT = ("device=cpu", "accountant=rdp", "trainer.num_steps=2", "sampler.sample_rate=0.1")


@pytest.mark.parametrize(
    "arguments",
    [
        ("model=cnn", "autocast=bfloat16"),
        ("model=transformer", "autocast=bfloat16", "trainer.activation_checkpointing=true"),
        slow("model=mlp", "engine=opacus", "autocast=bfloat16"),
        ("model=lstm", "dtype=bfloat16"),
        ("model=cnn", "dtype=bfloat16", "engine=vmap", "optimizer=adam"),
        slow("model=transformer", "dtype=bfloat16", "trainer.activation_checkpointing=true"),
    ],
    ids=" ".join,
)
def test_the_command_line_trains(arguments, tmp_path):
    done = command(*arguments, *SHORT, "run.dir=r", cwd=tmp_path)
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["steps"] == 2
    assert ("rounded away" in " ".join(done.stdout.split())) == ("dtype=bfloat16" in arguments)


def test_the_benchmark_measures_under_autocast(tmp_path):
    arguments = ("model=mlp", "autocast=bfloat16", "bench.engines=[ghost]", "bench.batch_size=8",
                 "bench.repetitions=1", "bench.memory=false", "bench.dir=b")  # fmt: skip
    command(*arguments, cwd=tmp_path, module="dpsgd.bench")
    assert "bfloat16" in (tmp_path / "b" / "bench.json").read_text()
