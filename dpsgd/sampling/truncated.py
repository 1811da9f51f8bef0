"""Poisson sampling with a largest batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dpsgd import rng
from dpsgd.accounting.releases import NoiseRuns, Releases, truncated_releases
from dpsgd.sampling.base import Theorems
from dpsgd.sampling.poisson import Poisson


@dataclass(frozen=True)
class TruncatedPoisson(Poisson):
    """Poisson sampling; of a larger draw, max_batch_size records chosen at random are kept.

    For memory that must not run out. An added record can push out another one, so one record moves
    a sum by up to 2 C; the accountant needs the true number of records to be the declared one
    (arXiv:2508.15089). PLD and add/remove only.

    Attributes:
        max_batch_size: The most records of a step, >= expected_batch_size.
    """

    max_batch_size: int = 0

    theorems: ClassVar[Theorems] = {("add_remove", "pld"): 2.0}
    size_is_public: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises ValueError as Poisson does, or if max_batch_size or public_size is missing."""
        super().__post_init__()
        if self.public_size is None or self.expected_batch_size is None:
            raise ValueError("Expected a declared public_size for truncated sampling, got None.")
        largest = self.max_batch_size
        if isinstance(largest, bool) or not isinstance(largest, int) or largest < 1:
            raise ValueError(f"Expected max_batch_size to be a whole number >= 1, got {largest!r}.")
        expected = self.expected_batch_size * max(self.factors.factors.values())
        if largest < expected:
            raise ValueError(
                f"Expected max_batch_size >= expected_batch_size = {expected:g}, "
                f"got {largest}: most batches would be cut. Lower the rate."
            )

    def sample(self, step: int, stop: int, start: int = 0) -> Tensor:
        """Returns what of a step's draw is kept, in [start, stop).

        Whether a record is kept depends on all of them: `stop` must be their number unless the
        range is a shard, in which case every process draws all and the caller cuts.
        """
        if start:
            raise ValueError("Expected start=0: truncation needs the draw of all records.")
        drawn = super().sample(step, stop)
        if len(drawn) <= self.max_batch_size:
            return drawn
        order = rng.uniforms(rng.derive(self.key, "truncation", step), 0, len(drawn)).argsort()
        return drawn[order[: self.max_batch_size].sort().values]

    def releases(self, noise: NoiseRuns, start: int = 0) -> Releases:
        """Returns one truncated Poisson-sampled Gaussian per step, each at the rate of its step."""
        assert self.public_size is not None
        each = (
            truncated_releases(rate, self.max_batch_size, self.public_size, [run])
            for rate, run in self._rates(noise, start)
        )
        return tuple(release for releases in each for release in releases)

    def describe(self) -> dict[str, Any]:
        """Returns the name, the law of the rate, the largest batch and the public size."""
        return {
            "sampler": "truncated_poisson",
            **self._law(),
            "max_batch_size": self.max_batch_size,
            "public_size": self.public_size,
        }

    def largest_batch(self) -> int:
        """Returns max_batch_size."""
        return self.max_batch_size
