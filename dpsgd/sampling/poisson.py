"""Poisson sampling: a coin for every record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dpsgd import rng
from dpsgd.accounting.releases import NoiseRuns, Releases, poisson_releases
from dpsgd.sampling.base import Sampler, Theorems

_BLOCK = 1 << 20
_SLACK = 8.0


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
    """

    theorems: ClassVar[Theorems] = {
        ("add_remove", "pld"): 1.0,
        ("add_remove", "rdp"): 1.0,
        ("replace_one", "pld"): 2.0,
    }

    def sample(self, step: int, stop: int, start: int = 0) -> Tensor:
        """Returns the positions in [start, stop) of the records drawn in a step, ascending int64.

        Args:
            step: Number of the step.
            stop: End of the range, for all records their number.
            start: Start of the range: disjoint ranges (of several processes) make up one draw.
        """
        key = rng.derive(self.key, "sampling", step)
        drawn = [
            self._block(rng.derive(key, "block", block), min(_BLOCK, stop - block * _BLOCK))
            + block * _BLOCK
            for block in range(start // _BLOCK, -(-stop // _BLOCK))
        ]
        positions = torch.cat(drawn) if drawn else torch.empty(0, dtype=torch.int64)
        return positions[positions >= start]

    def _block(self, key: bytes, size: int) -> Tensor:
        """Positions below `size` drawn in one block, from the gaps between successes.

        P(gap >= k) = (1 - q)^k = P(U <= (1 - q)^k), so the gap is floor(log U / log(1 - q)).
        """
        q = self.rate
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

    def releases(self, noise: NoiseRuns, start: int = 0) -> Releases:
        """Returns one Poisson-sampled Gaussian per step."""
        return poisson_releases(self.rate, noise)

    def describe(self) -> dict[str, Any]:
        """Returns the name and the rate."""
        return {"sampler": "poisson", "sample_rate": self.rate}
