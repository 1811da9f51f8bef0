"""What tests run in several processes: each program's result is kept in a file per rank."""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import dpsgd
from dpsgd import parallel, rng
from dpsgd.clipping import Flat
from dpsgd.engines import Ghost
from dpsgd.noise import Gaussian

KEY = bytes(range(32))
BATCH, FEATURES, CLASSES = 12, 5, 3


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width),
        )  # fmt: skip

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Frozen(nn.Module):
    """A frozen linear map with a trained low-rank one beside it, as LoRA has."""

    def __init__(self, width):
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.a, self.b = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Recomputed(Block):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Tied(nn.Module):
    """Token ids through an embedding that is the head, too."""

    def __init__(self, width):
        super().__init__()
        self.embed, self.block = nn.Embedding(FEATURES, width), Block(width)

    def forward(self, x):
        tokens = (x * 10).long() % FEATURES
        return F.linear(self.block(self.embed(tokens)), self.embed.weight).mean(1)[:, :CLASSES]


class Scaled(nn.Module):
    """A class token, a scale of its own and a part of a parameter: no module's function."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.pair = nn.Parameter(torch.randn(2 * width, width) / 3)

    def forward(self, x):
        first, second = self.pair.chunk(2)
        return x * self.scale @ first.T + x @ second.T


class Custom(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        return x * weight

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g * weight, (g * x).sum(0)


class Gated(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return Custom.apply(x, self.scale)


class Uncaptured(Gated):
    """A use of a parameter that no function mode sees."""

    def forward(self, x):
        with torch._C.DisableTorchFunction():
            return x * self.scale


def _weight_norm(width):
    return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(width, width)))


MIDDLES = {
    "blocks": lambda width: nn.Sequential(Block(width), Block(width)),
    "frozen": lambda width: nn.Sequential(Frozen(width), Frozen(width)),
    "recomputed": lambda width: nn.Sequential(Recomputed(width), Recomputed(width)),
    "scaled": lambda width: nn.Sequential(Scaled(width), Scaled(width)),
    "weight_norm": _weight_norm,
    "twice": lambda width: (lambda one: nn.Sequential(one, nn.Tanh(), one))(
        nn.Linear(width, width)
    ),
    "lstm": lambda width: nn.Sequential(Recurrent(width)),
    "custom": lambda width: nn.Sequential(Gated(width)),
    "uncaptured": lambda width: nn.Sequential(Uncaptured(width)),
}


class Recurrent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unsqueeze(1).expand(-1, 4, -1))[0][:, -1]


def model_of(name, width=7):
    torch.manual_seed(0)
    if name == "tied":
        return Tied(width).double()
    if name == "conv":
        layers = nn.Conv1d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, CLASSES)
        return nn.Sequential(nn.Unflatten(1, (1, -1)), *layers).double()
    return nn.Sequential(
        nn.Linear(FEATURES, width), MIDDLES[name](width), nn.Linear(width, CLASSES)
    ).double()


def sharded(name):
    model = model_of(name)
    for child in model.children():
        if isinstance(child, nn.Sequential | Block):
            fully_shard(child)
    return fully_shard(model)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batch_of(step=0):
    made = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, FEATURES, dtype=torch.float64, generator=made)
    return x, torch.randint(CLASSES, (BATCH,), generator=made)


def private_step(model, way, engine=None, noise_multiplier=1.0, **options):
    engine = Ghost(model, loss_fn) if engine is None else engine
    optimizer = torch.optim.Adam(engine.parameters.values(), lr=0.1)
    return dpsgd.PrivateStep(
        engine, optimizer, clipping=options.pop("clipping", Flat(max_grad_norm=1.0)),
        noise=options.pop("noise", None) or Gaussian(KEY), noise_multiplier=noise_multiplier,
        expected_batch_size=BATCH, parallel=way, **options,
    )  # fmt: skip


def share(batch, world):
    return tuple(x[world.rank :: world.size] for x in batch)


def sharded_norms(world, name):
    """Norms and losses of this process's samples, under FSDP2."""
    grads = Ghost(sharded(name), loss_fn)(share(batch_of(), world))
    return {"norms": grads.norms()[:, 0], "losses": grads.losses, "routes": grads.routes()}


def trained(world, way, name):
    """Weights after three steps, the second of which has no sample, with an evaluation between."""
    model = sharded(name) if way == "fsdp" else model_of(name)
    step = private_step(model, {"fsdp": parallel.fsdp, "ddp": parallel.ddp}[way]())
    step(share(batch_of(0), world))
    step.release()
    with torch.no_grad():
        model(batch_of(3)[0])
    step(share(batch_of(2), world))
    weights = step.parallel.weights(model)
    return weights if weights is not None else model.state_dict()


def counted(world, private):
    """How often each collective was called in a step, private or not."""
    from torch.profiler import ProfilerActivity, profile

    model = sharded("blocks")
    batch = share(batch_of(), world)
    if private:
        step = private_step(model, parallel.fsdp())
        once = lambda: step(batch)  # noqa: E731
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

        def once():
            loss_fn(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    once()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        once()
    return {e.key: e.count for e in seen.key_averages() if e.key.startswith("c10d::")}


def drawn_noise(world):
    """How many numbers of noise this process draws in a step, of how many parameters."""
    from dpsgd.normals import Normals

    drawn, pieces = [], Normals.pieces

    def noted(self, key, start, count):
        drawn.append((start, count))
        return pieces(self, key, start, count)

    Normals.pieces = noted
    model = sharded("blocks")
    private_step(model, parallel.fsdp())(share(batch_of(), world))
    return {"drawn": drawn, "parameters": sum(p.numel() for p in model.parameters())}


def refused(world, case):
    """What a job says that cannot work."""
    try:
        REFUSED[case](world)
    except ValueError as error:
        return str(error)
    return ""


def _other_key(world):
    private_step(model_of("blocks"), parallel.ddp(), noise=Gaussian(rng.fresh_key()))


def _other_weights(world):
    model = model_of("blocks")
    with torch.no_grad():
        model[0].bias[0] += world.rank
    private_step(model, parallel.ddp())


def _other_clipping(world):
    private_step(model_of("blocks"), parallel.ddp(), clipping=Flat(max_grad_norm=1.0 + world.rank))


def _other_engine(world):
    model = sharded("blocks")
    private_step(model, parallel.fsdp(), engine=dpsgd.engines.Vmap(model, loss_fn))


def _engine_alone(world):
    dpsgd.engines.Hooks(sharded("blocks"), loss_fn)(batch_of())


def _not_sharded(world):
    private_step(model_of("blocks"), parallel.fsdp())


def _uncaptured(world):
    Ghost(sharded("uncaptured"), loss_fn)(batch_of())


def _splits(world):
    def split(model, batch):
        x, _y = batch
        return loss_fn(model, batch) * (2.0 if bool((x[:, 0] > 0).all()) else 1.0)

    Ghost(sharded("blocks"), split)(batch_of())


def _no_parallel(world):
    private_step(model_of("blocks"), None)


def _used_twice(world):
    way = parallel.ddp()
    private_step(model_of("blocks"), way)
    private_step(model_of("blocks"), way)


def _another_step(world):
    step = private_step(model_of("blocks"), parallel.ddp())
    step.step += world.rank
    step(batch_of())


def _frozen_on_one(world):
    model = model_of("blocks")
    step = private_step(model, parallel.ddp())
    model[0 if world.rank else 2].bias.requires_grad_(False)
    step(batch_of())


def _a_pass_less(world):
    step = private_step(sharded("blocks"), parallel.fsdp())
    for number in range(2):
        if world.rank or number:
            step.accumulate(batch_of(number))
        step.release()


def _no_rows(world):
    step = private_step(sharded("blocks"), parallel.fsdp())
    step.accumulate(tuple(x[: world.rank] for x in batch_of()))


def _ddp_of_shards(world):
    private_step(sharded("blocks"), parallel.ddp())


def _sharded_later(world):
    model = model_of("blocks")
    step = private_step(model, parallel.ddp())
    fully_shard(model)
    step.release()


def _other_draws(world):
    from dpsgd.data import Dataset
    from dpsgd.plan import PrivacyPlan
    from dpsgd.sampling import Poisson
    from dpsgd.trainer import Trainer

    x, y = batch_of()
    data = Dataset((x.float(), y), None, (FEATURES,), CLASSES, BATCH)
    sampler = Poisson(0.5, public_size=BATCH)  # a fresh key in each process
    plan = PrivacyPlan(sampler, Flat(max_grad_norm=1.0), 2, 1.0, 1e-5)
    engine = Ghost(model_of("blocks").float(), loss_fn)
    optimizer = torch.optim.SGD(engine.parameters.values(), lr=0.1)
    Trainer(
        plan.private_step(engine, optimizer, Gaussian(KEY), parallel.ddp()), data, plan,
        physical_batch_size=4,
    )  # fmt: skip


REFUSED = {
    "draws": _other_draws,
    "no parallel": _no_parallel, "used twice": _used_twice, "another step": _another_step,
    "frozen on one": _frozen_on_one, "a pass less": _a_pass_less, "no rows": _no_rows,
    "ddp of shards": _ddp_of_shards, "sharded later": _sharded_later,
    "key": _other_key, "weights": _other_weights, "clipping": _other_clipping,
    "engine": _other_engine, "engine alone": _engine_alone, "not sharded": _not_sharded,
    "uncaptured": _uncaptured, "splits": _splits,
}  # fmt: skip


def main():
    name, *arguments = sys.argv[1:]
    with parallel.joined() as world:
        result = globals()[name](world, *arguments)
        torch.save(result, Path.cwd() / f"{name}-{os.environ['RANK']}.pt")
