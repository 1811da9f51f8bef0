"""What needs a CUDA device: `make test-gpu`. (TEST_DEVICE=cpu tries the tests themselves.)"""

import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, refusal
from command_line import command
from jobs import job
from safetensors.torch import load_file
from torch import nn

from dpsgd import PrivateStep, engines
from dpsgd.clipping import Flat
from dpsgd.noise import Gaussian
from dpsgd.placement import Placement
from dpsgd.precision import Autocast
from dpsgd.recomputation import Recomputed

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
ENGINES = [engines.Ghost, engines.Hooks, engines.Vmap]
KEY = "ab" * 32
SMALL = (
    "model=mlp", f"device={DEVICE}", "sampler.sample_rate=0.05",
    "trainer.num_steps=5", "trainer.physical_batch_size=16", "privacy.noise_multiplier=1",
    f"privacy.key={KEY}", "dtype=float64",
)  # fmt: skip


def there(batch, dtype=torch.float64):
    return Placement(torch.device(DEVICE), dtype).batch(batch)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10))
    return model.to(DEVICE, dtype)


def images(size=12, dtype=torch.float64):
    torch.manual_seed(1)
    return there((torch.randn(size, 1, 8, 8), torch.randint(10, (size,))), dtype)


EXACT = [case for case in CASES if not refusal(case.name, "ghost", torch.float64)]


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_the_ghost_engine_agrees_with_the_loop(case):
    model, loss, batch = case.build(torch.float64)
    model, batch = model.to(DEVICE), there(batch)
    expected, grads = engines.Loop(model, loss)(batch), engines.Ghost(model, loss)(batch)
    scale = expected.norms().max()
    torch.testing.assert_close(grads.norms(), expected.norms(), rtol=1e-9, atol=float(1e-9 * scale))
    weights = torch.rand(len(expected.losses), device=DEVICE, dtype=torch.float64)
    totals, found = expected.weighted_sum(weights), grads.weighted_sum(weights)
    for name, total in totals.items():
        torch.testing.assert_close(found[name], total, rtol=1e-9, atol=float(1e-9 * scale))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("wrapped", [Autocast, lambda loss: loss])
@pytest.mark.parametrize("size", [1, 12, 300])
def test_no_sample_moves_the_sum_by_more_than_c(engine, wrapped, size):
    model, batch = network(torch.float32), images(size, torch.float32)
    batch[0][0] *= 1e6
    grads = engine(model, wrapped(loss_fn))(batch)
    weights = Flat(max_grad_norm=1.0)(grads.norms())
    alone = torch.zeros_like(weights)
    alone[0] = weights[0]
    total = grads.weighted_sum(alone)
    assert math.sqrt(sum(float(x.double().square().sum()) for x in total.values())) <= 1 + 1e-6
    assert all(x.dtype == torch.float32 for x in total.values())


def test_recomputed_blocks_give_the_same():
    model, batch = network(), images()
    expected = engines.Ghost(model, loss_fn)(batch).norms()
    torch.testing.assert_close(engines.Ghost(model, Recomputed(loss_fn))(batch).norms(), expected)


def test_the_noise_is_that_of_the_processor():
    here, elsewhere = torch.zeros(1000, device=DEVICE), torch.zeros(1000)
    for sums in (here, elsewhere):
        Gaussian(bytes(32)).add_({"x": sums}, 1.0, 0)
    torch.testing.assert_close(here.cpu(), elsewhere)


def test_a_step_leaves_sums_and_parameters_on_the_device():
    model = network(torch.float32)
    engine = engines.Ghost(model, loss_fn)
    step = PrivateStep(
        engine, torch.optim.Adam(model.parameters()), clipping=Flat(1.0), noise=Gaussian(),
        noise_multiplier=1.0, expected_batch_size=12,
    )  # fmt: skip
    step(images(dtype=torch.float32))
    assert all(p.device.type == DEVICE and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "extra",
    [
        ("dtype=bfloat16",), ("autocast=bfloat16", "dtype=float32"),
        ("trainer.physical_batch_size=auto",), ("model=transformer", "dtype=float32"),
        ("trainer.activation_checkpointing=true",), ("clipping=adaptive",),
    ],
)  # fmt: skip
def test_the_command_trains(extra, tmp_path):
    command(*SMALL, *extra, "run.dir=run", cwd=tmp_path)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["steps"] == 5
    assert math.isfinite(report["test"]["test_loss"])


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_all_devices_train_what_one_trains(way, tmp_path):
    processes = torch.cuda.device_count() if DEVICE == "cuda" else 2
    command(*SMALL, "run.dir=one", cwd=tmp_path)
    job(*SMALL, "run.dir=all", f"parallel={way}", processes=processes, cwd=tmp_path)
    expected, found = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "all"))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-12, atol=1e-12)


def test_a_language_model_with_adapters(tmp_path):
    command(
        "experiment=lm_lora", "trainer.num_steps=2", f"device={DEVICE}", "run.dir=run", cwd=tmp_path
    )
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert math.isfinite(report["test"]["test_perplexity"])
