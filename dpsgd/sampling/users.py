"""User-level sampling: the unit that is drawn, clipped and protected is a user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dpsgd.sampling.poisson import Poisson


@dataclass(frozen=True)
class UserPoisson(Poisson):
    """Poisson sampling of users, of each of whom up to records_per_user records join a step.

    A user's loss is the mean over these records, so that all of a user's records together move a
    sum by at most C: the guarantee is for adding or removing (or replacing) a whole user. Of a user
    with more records, some are chosen at random in each step. The data must say which user a record
    belongs to.

    Attributes:
        sample_rate: Probability that a user joins a step.
        expected_batch_size: Expected number of users per step.
        public_size: The declared number of users.
        records_per_user: The most records of a user in one step, k.
    """

    records_per_user: int = 1

    unit: ClassVar[str] = "user"

    def __post_init__(self) -> None:
        """Raises ValueError as Poisson does, or if records_per_user is not positive."""
        super().__post_init__()
        k = self.records_per_user
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"Expected records_per_user to be a whole number >= 1, got {k!r}.")

    def describe(self) -> dict[str, Any]:
        """Returns the name, the law of the rate and the number of records per user."""
        return {
            "sampler": "user_poisson",
            **self._law(),
            "records_per_user": self.records_per_user,
        }
