"""Samplers: which records join a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpsgd import rng

_BLOCK = 1 << 20
_SLACK = 8.0


@dataclass(frozen=True)
class Poisson:
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

    sample_rate: float | None = None
    expected_batch_size: float | None = None
    public_size: int | None = None
    key: bytes = field(default_factory=rng.fresh_key, repr=False)

    def __post_init__(self) -> None:
        """Works out the missing one of sample_rate and expected_batch_size.

        Raises:
            ValueError: If not exactly one of them is given, or a value is out of range.
        """
        rng.check_key(self.key)
        if self.public_size is not None and not self.public_size >= 1:
            raise ValueError(f"Expected public_size >= 1, got {self.public_size}.")
        if (self.sample_rate is None) == (self.expected_batch_size is None):
            raise ValueError(
                "Expected either sample_rate or expected_batch_size, got "
                f"{'neither' if self.sample_rate is None else 'both'}."
            )
        if self.sample_rate is None:
            self._derive_rate()
        elif not 0 < self.sample_rate <= 1:
            raise ValueError(f"Expected 0 < sample_rate <= 1, got {self.sample_rate}.")
        elif self.public_size is not None:
            object.__setattr__(self, "expected_batch_size", self.sample_rate * self.public_size)

    def __reduce__(self) -> str:
        raise ValueError("Expected a sampler to stay in its process: a pickle would hold its key.")

    def _derive_rate(self) -> None:
        expected, size = self.expected_batch_size, self.public_size
        if size is None:
            raise ValueError("Expected public_size beside expected_batch_size, got None.")
        if expected is None or not 0 < expected <= size:
            raise ValueError(
                f"Expected 0 < expected_batch_size <= public_size = {size}, got {expected}."
            )
        object.__setattr__(self, "sample_rate", expected / size)

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
        q = self.sample_rate
        assert q is not None
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
