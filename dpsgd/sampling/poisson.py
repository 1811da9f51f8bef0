"""Poisson sampling: a coin for every record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dpsgd import rng
from dpsgd.accounting.releases import NoiseRuns, Releases, poisson_releases
from dpsgd.sampling.base import Sampler, Theorems
from dpsgd.schedules import CONSTANT, Schedule

_BLOCK = 1 << 20
_SLACK = 8.0
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Poisson(Sampler):
    """Each record joins each step independently with probability q; batches vary in size.

    A record's coin is a function of (key, step, position of the record) alone: no physical batch
    size, world size or appended record changes it. Records come in fixed blocks of 2^20, each with
    a stream of its own from which the gaps between drawn records are read (geometric variables
    from 64-bit integers), so that a step costs O(q N), not O(N).

    Attributes:
        sample_rate: q in (0, 1].
        expected_batch_size: q * public_size, the public divisor of the sum. Give either of the two.
        public_size: The declared number of records; the actual number is never consulted.
        key: 32 secret bytes, by default fresh ones from the operating system.
        schedule: Factors of the sample rate by step, {0: 0.25, 100: 1.0}: batches that grow, as in
            Anil et al. (2021), arXiv:2108.01624. Each step is accounted for at its own rate.
    """

    schedule: Mapping[int, float] | None = None

    theorems: ClassVar[Theorems] = {
        ("add_remove", "pld"): 1.0,
        ("add_remove", "rdp"): 1.0,
        ("replace_one", "pld"): 2.0,
    }

    def __post_init__(self) -> None:
        """Raises ValueError as every sampler does, or if the schedule leads to a rate above 1."""
        super().__post_init__()
        highest = max(self.factors.factors.values())
        if self.rate * highest > 1 + _ROUNDING:
            raise ValueError(
                f"Expected sample_rate times every factor of schedule <= 1, got {self.rate:g} * "
                f"{highest:g}. Lower the rate or the factor."
            )

    @property
    def factors(self) -> Schedule:
        """Factors of the sample rate, and with it of the expected batch size, by step."""
        return CONSTANT if self.schedule is None else Schedule(self.schedule)

    def sample(self, step: int, stop: int, start: int = 0) -> Tensor:
        """Returns the positions in [start, stop) of the records drawn in a step, ascending int64.

        Args:
            step: Number of the step.
            stop: End of the range, for all records their number.
            start: Start of the range: disjoint ranges (of several processes) make up one draw.
        """
        key, q = rng.derive(self.key, "sampling", step), self.rate_at(step)
        drawn = [
            _block(rng.derive(key, "block", block), min(_BLOCK, stop - block * _BLOCK), q)
            + block * _BLOCK
            for block in range(start // _BLOCK, -(-stop // _BLOCK))
        ]
        positions = torch.cat(drawn) if drawn else torch.empty(0, dtype=torch.int64)
        return positions[positions >= start]

    def releases(self, noise: NoiseRuns, start: int = 0) -> Releases:
        """Returns one Poisson-sampled Gaussian per step, each at the rate of its step."""
        each = (poisson_releases(rate, [run]) for rate, run in self._rates(noise, start))
        return tuple(release for releases in each for release in releases)

    def _rates(self, noise: NoiseRuns, start: int) -> Iterator[tuple[float, tuple[float, int]]]:
        """Yields the rate of steps that have it in common with their noise multiplier, and both.

        Args:
            noise: The noise multipliers of these steps, each with how many steps it lasts.
            start: Number of the first of them.
        """
        for factor, sigma, count in self.factors.split(noise, start):
            yield min(1.0, self.rate * factor), (sigma, count)

    def describe(self) -> dict[str, Any]:
        """Returns the name and the rate, and its schedule if it has one."""
        return {"sampler": "poisson", **self._law()}

    def _law(self) -> dict[str, Any]:
        """Returns the rate, and its schedule if it has one, as plain values."""
        if self.schedule is None:
            return {"sample_rate": self.rate}
        factors = {str(step): factor for step, factor in self.factors.factors.items()}
        return {"sample_rate": self.rate, "schedule": factors}


def _block(key: bytes, size: int, q: float) -> Tensor:
    """Positions below `size` drawn in one block, from the gaps between successes.

    P(gap >= k) = (1 - q)^k = P(U <= (1 - q)^k), so the gap is floor(log U / log(1 - q)).
    """
    if q == 1:
        return torch.arange(size)
    expected = q * size
    count = int(expected + _SLACK * math.sqrt(expected) + _SLACK)
    reached, used, parts = -1.0, 0, []
    while reached < size:
        uniform = rng.uniforms(key, used, count)
        gaps = uniform.log_().div_(math.log1p(-q)).floor_().clamp_(max=float(_BLOCK)).add_(1)
        positions = gaps.cumsum(0).add_(reached)
        parts.append(positions)
        reached, used = float(positions[-1]), used + count
    positions = torch.cat(parts)
    return positions[positions < size].to(torch.int64)
