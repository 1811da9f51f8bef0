"""Two worlds, D and D plus one record, through a real trainer with coupled noise and coins."""

from __future__ import annotations

import torch
from torch import nn

from dpsgd import clipping, losses
from dpsgd.data import Dataset
from dpsgd.noise import Gaussian
from dpsgd.plan import PrivacyPlan
from dpsgd.sampling import Poisson
from dpsgd.trainer import Trainer

KEY = bytes(range(32))
SIZE = 12


class Recorded(Gaussian):
    """Gaussian noise that keeps what was released."""

    def __init__(self, key=None):
        super().__init__(key)
        self.released = []

    def add_(self, sums, std, step, offsets=None):
        super().add_(sums, std, step, offsets)
        self.released.append({name: total.clone() for name, total in sums.items()})


def vectors():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return model, {"input_shape": (6,), "num_classes": 4}, torch.randn(SIZE, 6)


def images():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, 4))
    return model, {"input_shape": (1, 6, 6), "num_classes": 4}, torch.randn(SIZE, 1, 6, 6)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.head = nn.Linear(5, 4)
        self.head2 = nn.Linear(4, 4)

    def forward(self, x):
        return self.head2(torch.tanh(self.head(self.embedding(x)).mean(1)))


def tokens():
    return (
        Bag(),
        {"input_shape": (16,), "num_classes": 4, "vocab_size": 9},
        torch.randint(9, (SIZE, 16)),
    )


def trainer(
    build,
    engine,
    dtype,
    extra=(),
    *,
    rate=1.0,
    steps=1,
    noise_multiplier=0.5,
    physical=5,
    policy=None,
    sampler=None,
    users=None,
    loss=losses.cross_entropy,
    **options,
):
    """A trainer over SIZE records plus the extra ones, and the noise that records its releases."""
    torch.manual_seed(0)
    model, schema, x = build()
    model = model.to(dtype)
    y = torch.arange(SIZE) % 4
    data = Dataset((x, y), None, public_size=SIZE, users=users, **schema)
    noise = Recorded(KEY)
    plan = PrivacyPlan(
        sampler or Poisson(sample_rate=rate, public_size=SIZE, key=KEY),
        policy or clipping.Flat(1.0),
        steps,
        noise_multiplier,
        1e-5,
        **{"accountant": "rdp", **options},
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = plan.private_step(engine(model, loss), optimizer, noise)
    made = Trainer(step, data, plan, physical_batch_size=physical)
    for record, label in extra:  # after all checks
        together = torch.cat([data.train[0], record[None]]), torch.cat([data.train[1], label[None]])
        object.__setattr__(data, "train", together)
    return made, noise


def moved(first, second):
    """L2 distance of two releases, over all parameters."""
    return sum(((first[n].double() - second[n].double()) ** 2).sum() for n in first).sqrt().item()
