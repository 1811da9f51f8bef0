"""What is audited: a trainer's engine, model, clipping, sampler, noise and plan, on made-up units.

Nothing here reads a private record: all units are made up from the declared schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dpsgd import checks
from dpsgd.clipping import Clipping
from dpsgd.data import Dataset
from dpsgd.engines import Batch
from dpsgd.noise import Gaussian
from dpsgd.placement import Placement
from dpsgd.plan import PrivacyPlan
from dpsgd.recipe import Recipe
from dpsgd.sampling import UserPoisson
from dpsgd.trainer import Trainer

_PHYSICAL = 8
_SCALES = (2.0, 20.0, 200.0, 2000.0)
_CANDIDATES = 16
_MOST_VALUES = 10**8
_CLIPPED = 0.999
_SMALL = 10**6

MakeNoise = Callable[[bytes], Gaussian]


@dataclass(frozen=True)
class Units:
    """Made-up units, records or users.

    Attributes:
        x: Inputs [n, k, ...], k records of each (1 where the unit is a record).
        y: Targets [n, k, ...].
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __add__(self, other: Units) -> Units:
        return Units(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]))

    def __getitem__(self, rows: slice | Tensor) -> Units:
        return Units(self.x[rows], self.y[rows])


class Subject:
    """A configuration under audit. Only made-up records of its declared schema are used.

    Args:
        trainer: A trainer as it would train; its model keeps its weights.
        make_noise: Returns its kind of noise for a key.
    """

    def __init__(self, trainer: Trainer, make_noise: MakeNoise = Gaussian) -> None:
        self.plan = trainer.plan
        self.engine = trainer.step.engine
        self.declared = trainer.data
        self.make_noise = make_noise
        self.recipe = Recipe(augmentation=trainer.recipe.augmentation)
        self.place = Placement.of(self.engine.model)
        sampler = self.plan.sampler
        self.per_unit = sampler.records_per_user if isinstance(sampler, UserPoisson) else 1

    @property
    def coordinates(self) -> int:
        """Number of trained parameters, P."""
        return sum(p.numel() for p in self.engine.parameters.values())

    def units(self, count: int) -> Units:
        """Returns made-up units of the declared shapes."""
        x, y = checks.synthetic_batch(self.declared, max(1, count) * self.per_unit, padded=False)
        shape = (-1, self.per_unit)
        return Units(x.unflatten(0, shape)[:count], y.unflatten(0, shape)[:count])

    def candidates(self, count: int = _CANDIDATES) -> Units:
        """Returns units with large gradients: inputs far out, or token ids at random.

        The inputs are enlarged until some gradient reaches the clip norm.
        """
        made = self.units(min(count, max(2, _MOST_VALUES // self.coordinates)))
        if self.declared.vocab_size is not None:
            return made
        clipping = self.plan.clipping.at(0)
        for scale in _SCALES:
            found = Units((made.x - 0.5) * scale, made.y)
            largest = float(self.contributions(found, clipping).norm(dim=1).max())
            if largest >= _CLIPPED * clipping.full_weight * clipping.max_grad_norm:
                break
        return found

    def canary(self) -> Units:
        """Returns the candidate that moves a sum the most."""
        found = self.candidates()
        best = int(self.contributions(found, self.plan.clipping.at(0)).norm(dim=1).argmax())
        return found[best : best + 1]

    def canaries(self) -> tuple[Units, Units]:
        """Returns the two candidates that move a sum the most when one replaces the other."""
        found = self.candidates()
        moved = self.contributions(found, self.plan.clipping.at(0))
        first, second = divmod(int(torch.cdist(moved, moved).argmax()), len(found))
        return found[first : first + 1], found[second : second + 1]

    def trainer(self, units: Units, plan: PrivacyPlan, noise: Gaussian, key: bytes) -> Trainer:
        """Returns the shipped trainer over these units.

        Its learning rate moves a weight by about 1 per step, so that rounding hides nothing.

        Args:
            units: What it draws from; they pass no check.
            plan: What it runs.
            noise: Its noise.
            key: Of the sampler.
        """
        sampler = replace(plan.sampler, key=key, expected_batch_size=None)
        plan = replace(plan, sampler=sampler)
        rate = plan.expected_batch_size_at(0) / (plan.noise_at(0) * plan.clipping.at(0).sensitivity)
        optimizer = torch.optim.SGD(list(self.engine.parameters.values()), lr=rate)
        made = Trainer(
            plan.private_step(self.engine, optimizer, noise),
            self._stand_in,
            plan,
            physical_batch_size=_PHYSICAL,
            evaluate_every=plan.num_steps + 1,
            recipe=self.recipe,
        )
        made.draw_from(self._dataset(units))
        return made

    def releases(self, trainer: Trainer) -> Iterator[tuple[Clipping, Tensor]]:
        """Yields each step's clipping and its release [P], as read off the weights.

        (w_t - w_{t+1}) * expected_batch_size / lr is the noised sum, whatever happened to it on
        its way. After each step the weights are put back: an attacker may choose them, and the
        canary's gradient stays what it is.
        """
        weights = list(self.engine.parameters.values())
        before = [p.detach().clone() for p in weights]
        rate = trainer.step.optimizer.param_groups[0]["lr"]
        steps = trainer.run()
        try:
            while True:
                step = trainer.step.step
                clipping = trainer.step.clipping.at(step)  # public: it learns in noise
                if next(steps, None) is None:
                    return
                scale = trainer.plan.expected_batch_size_at(step) / rate
                yield clipping, scale * (flat(before) - flat(weights))
                _put(weights, before)
        finally:
            _put(weights, before)

    def contributions(self, units: Units, clipping: Clipping) -> Tensor:
        """Returns what each unit alone adds to a sum when it is drawn, [n, P]."""
        groups = clipping.groups(list(self.engine.parameters))
        rows = []
        for number in range(len(units)):
            grads = self.engine(self.place.batch(self._batch(units[number : number + 1])))
            weights = clipping(grads.norms(groups))
            rows.append(flat(grads.weighted_sum(weights, groups).values()))
        return torch.stack(rows) if rows else torch.zeros(0, self.coordinates, dtype=torch.float64)

    def _batch(self, units: Units) -> Batch:
        rows = torch.zeros(units.x.shape[:2], dtype=torch.int64)  # the views of any record will do
        batch: Batch = (units.x, units.y, torch.ones_like(rows).bool())
        if not isinstance(self.plan.sampler, UserPoisson):
            batch, rows = (units.x[:, 0], units.y[:, 0]), rows[:, 0]
        views = self.recipe.augmentation
        return batch if views is None else views(batch, 0, 0, rows)

    @cached_property
    def _stand_in(self) -> Dataset:
        """As many records as declared, in the memory of one, for the trainer's own checks."""
        unit = self.units(1)
        size = self.plan.sampler.public_size or 1
        x, y = (t[0, :1].expand(size, *t.shape[2:]) for t in (unit.x, unit.y))
        return self._made(x, y, torch.arange(size))

    def _dataset(self, units: Units) -> Dataset:
        users = torch.arange(len(units)).repeat_interleave(self.per_unit)
        return self._made(units.x.flatten(0, 1), units.y.flatten(0, 1), users)

    def _made(self, x: Tensor, y: Tensor, users: Tensor) -> Dataset:
        """A data set of these records, which pass no check: they may be hostile."""
        made = object.__new__(Dataset)
        fields = {**vars(self.declared), "train": (x, y), "test": None, "users": users}
        for name, value in fields.items():
            object.__setattr__(made, name, value)
        return made


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Returns tensors as one vector [P] in double precision on the CPU."""
    return torch.cat([t.detach().cpu().double().flatten() for t in tensors])


def witness(noise: Gaussian) -> list[Mapping[str, Tensor]]:
    """Returns a list to which each release is appended right after its noise, before the division.

    It holds the sums by parameter, and the clipping statistic if there is one.
    """
    released: list[Mapping[str, Tensor]] = []
    add = noise.add_

    def add_and_keep(
        sums: Mapping[str, Tensor],
        std: float,
        step: int,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        add(sums, std, step, offsets)
        released.append({name: total.clone() for name, total in sums.items()})

    noise.add_ = add_and_keep  # type: ignore[method-assign]
    return released


@contextmanager
def few_threads(subject: Subject) -> Iterator[None]:
    """One thread for small models on a CPU: many short steps would wait for each other's ends."""
    before = torch.get_num_threads()
    if subject.coordinates < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _put(weights: list[torch.nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(weights, values, strict=True):
            p.copy_(value)
