"""Fixed batches of a shuffled data set: what most training does, at its true price."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dpsgd import rng
from dpsgd.accounting.releases import NoiseRuns, Releases, gaussian_releases
from dpsgd.sampling.base import Sampler, Theorems


@dataclass(frozen=True)
class Shuffled(Sampler):
    """Every record once per epoch, in batches of one size; the last batch of an epoch is smaller.

    No amplification: an epoch counts as one Gaussian release in which replacing a record moves the
    sums by 2 C (each record is in one batch of an epoch). Counting shuffled batches as Poisson
    samples under-states epsilon several times over (Chua et al. 2024, arXiv:2403.17673). Prefer
    `Poisson`. replace_one and PLD only: under add/remove one record shifts all batches.

    Attributes:
        sample_rate: Share of the records in a batch; the batch size is rounded up.
        expected_batch_size: The batch size, a whole number. Give either of the two.
    """

    theorems: ClassVar[Theorems] = {("replace_one", "pld"): 2.0}
    size_is_public: ClassVar[bool] = True
    caution: ClassVar[str | None] = (
        "Shuffled batches get no amplification by sampling: every epoch counts as one release in "
        "which a record moves the sum by 2 C. sampler=poisson spends far less for the same noise."
    )

    batch_size: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Raises ValueError as every sampler does, or if the batch size is no whole number."""
        rated = self.expected_batch_size is None
        super().__post_init__()
        if self.public_size is None or self.expected_batch_size is None:
            raise ValueError("Expected a declared public_size for shuffled batches, got None.")
        size = self.expected_batch_size
        if not rated and size != int(size):
            raise ValueError(
                f"Expected a whole expected_batch_size of shuffled batches, got {size}."
            )
        whole = int(-(-(size - 1e-9) // 1))
        object.__setattr__(self, "batch_size", whole)
        object.__setattr__(self, "expected_batch_size", float(whole))
        object.__setattr__(self, "sample_rate", whole / self.public_size)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches that hold every record once."""
        assert self.public_size is not None
        return -(-self.public_size // self.batch_size)

    def sample(self, step: int, stop: int, start: int = 0) -> Tensor:
        """Returns the positions of a batch that lie in [start, stop), ascending int64."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = _order(rng.derive(self.key, "shuffling", epoch), self.public_size)
        rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        positions = torch.from_numpy(np.sort(rows))
        return positions[(positions >= start) & (positions < stop)]

    def releases(self, noise: NoiseRuns, start: int = 0) -> Releases:
        """Returns one Gaussian per begun epoch, with the least noise of its steps."""
        least: dict[int, float] = {}
        step = start
        for sigma, count in noise:
            for epoch in range(
                step // self.steps_per_epoch, -(-(step + count) // self.steps_per_epoch)
            ):
                least[epoch] = min(least.get(epoch, sigma), sigma)
            step += count
        every = list(least.values())
        runs = {sigma: every.count(sigma) for sigma in sorted(set(every))}
        return gaussian_releases(list(runs.items()))

    def describe(self) -> dict[str, Any]:
        """Returns the name, the batch size and the public size."""
        return {
            "sampler": "shuffled",
            "batch_size": self.batch_size,
            "public_size": self.public_size,
        }

    def largest_batch(self) -> int:
        """Returns the batch size."""
        return self.batch_size


@lru_cache(maxsize=2)
def _order(key: bytes, size: int) -> np.ndarray:
    """A permutation of range(size): O(size) memory, made once per epoch."""
    seed = int.from_bytes(key, "big")
    return np.random.Generator(np.random.PCG64(seed)).permutation(size)
