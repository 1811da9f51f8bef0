"""What every sampler is: a law of drawing, with the theorem that accounts for it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from dpsgd import rng
from dpsgd.accounting.releases import AccountantName, Adjacency, NoiseRuns, Releases
from dpsgd.schedules import CONSTANT, Schedule

Theorems: TypeAlias = Mapping[tuple[Adjacency, AccountantName], float]


@dataclass(frozen=True)
class Sampler(ABC):
    """Draws the units of each step; a draw is a function of (key, step) alone.

    Attributes:
        sample_rate: Expected share of the units that join a step, in (0, 1].
        expected_batch_size: sample_rate * public_size, the public divisor of the sum. Give either
            of the two.
        public_size: The declared number of units; the actual number is never consulted.
        key: 32 secret bytes, by default fresh ones from the operating system.
    """

    sample_rate: float | None = None
    expected_batch_size: float | None = None
    public_size: int | None = None
    key: bytes = field(default_factory=rng.fresh_key, repr=False)

    theorems: ClassVar[Theorems] = {}
    """Pairs (adjacency, accountant) that a theorem covers, with the T1 factor: by how many clip
    norms the change of one unit moves a sum."""

    unit: ClassVar[str] = "record"
    """What is drawn and protected: a record or a user."""

    size_is_public: ClassVar[bool] = False
    """Whether the guarantee needs the true number of units to be the declared one."""

    caution: ClassVar[str | None] = None
    """What whoever chooses this sampler should be told, if anything."""

    def __post_init__(self) -> None:
        """Works out the missing one of sample_rate and expected_batch_size.

        Raises:
            ValueError: If not exactly one of them is given, or a value is out of range.
        """
        rng.check_key(self.key)
        size = self.public_size
        if size is not None and not size >= 1:
            raise ValueError(f"Expected public_size >= 1, got {size}.")
        if (self.sample_rate is None) == (self.expected_batch_size is None):
            raise ValueError(
                "Expected either sample_rate or expected_batch_size, got "
                f"{'neither' if self.sample_rate is None else 'both'}."
            )
        if self.sample_rate is None:
            self._derive_rate()
        elif not 0 < self.sample_rate <= 1:
            raise ValueError(f"Expected 0 < sample_rate <= 1, got {self.sample_rate}.")
        elif size is not None:
            object.__setattr__(self, "expected_batch_size", self.sample_rate * size)

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

    @property
    def rate(self) -> float:
        """The sample rate, known once the sampler is made."""
        assert self.sample_rate is not None
        return self.sample_rate

    @property
    def factors(self) -> Schedule:
        """Factors of the sample rate, and with it of the expected batch size, by step."""
        return CONSTANT

    def rate_at(self, step: int) -> float:
        """Returns the sample rate of a step."""
        return min(1.0, self.rate * self.factors(step))

    @abstractmethod
    def sample(self, step: int, stop: int, start: int = 0) -> Tensor:
        """Returns the positions in [start, stop) of the units drawn in a step, ascending int64.

        Args:
            step: Number of the step.
            stop: End of the range, for all units their number.
            start: Start of the range: disjoint ranges (of several processes) make up one draw.
        """

    @abstractmethod
    def releases(self, noise: NoiseRuns, start: int = 0) -> Releases:
        """Returns what steps release, as events for the accountant.

        Args:
            noise: The noise multipliers of these steps, each with how many steps it lasts.
            start: Number of the first of them.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns the law as plain values, for the ledger and the report; no key."""

    def largest_batch(self) -> int:
        """Returns the number of units that physical batches are cut to at most."""
        return math.ceil(self.public_size or 1)
