"""Records by user: what user-level sampling draws from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dpsgd import rng
from dpsgd.data.base import Dataset


@dataclass(frozen=True, eq=False)
class Users:
    """The training records of a data set, grouped by user.

    Attributes:
        data: A data set that says whose its records are.
        records_per_user: The most records of a user that are taken at once, k.
        key: 32 secret bytes: which records of a user with more than k are taken.

    Raises:
        ValueError: If the data set does not say whose its records are.
    """

    data: Dataset
    records_per_user: int
    key: bytes

    def __post_init__(self) -> None:
        rng.check_key(self.key)
        if self.data.users is None:
            raise ValueError(
                "Expected data that says whose each record is, for user-level sampling. Give "
                "users [N] with the records, or sample records: sampler=poisson."
            )

    def __len__(self) -> int:
        """Returns the true number of users, which is private."""
        return len(self._starts) - 1

    def choose(self, users: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Returns which records of users [n] join a step: positions [n, k] and present [n, k].

        present is False where a user has fewer than k records; there the user's first one stands
        again, so that nothing odd is computed for nothing.
        """
        starts, k = self._starts[users], self.records_per_user
        counts = self._starts[users + 1] - starts
        offsets = counts.cumsum(0) - counts
        owner = torch.arange(len(users)).repeat_interleave(counts)
        within = torch.arange(len(owner)) - offsets.repeat_interleave(counts)
        rows = self._order[starts.repeat_interleave(counts) + within]
        lots = rng.uniforms(rng.derive(self.key, "records", step), 0, len(rows)).argsort()
        rows = rows[lots[owner[lots].argsort(stable=True)]]  # users in order, records in any
        places = torch.arange(k).expand(len(users), k)
        present = places < counts[:, None]
        return rows[offsets[:, None] + torch.where(present, places, 0)], present

    def take(self, rows: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns chosen records as inputs [n, k, ...], targets [n, k, ...] and present [n, k]."""
        x, y = self.data.take(rows.reshape(-1))
        return x.unflatten(0, rows.shape), y.unflatten(0, rows.shape), present

    @cached_property
    def _order(self) -> Tensor:
        assert self.data.users is not None
        return self.data.users.argsort(stable=True)

    @cached_property
    def _starts(self) -> Tensor:
        """Where each user's records start in the order, and their end, [users + 1]."""
        assert self.data.users is not None
        counts = self.data.users.unique(return_counts=True)[1]
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
