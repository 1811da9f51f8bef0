"""A data set: private records in memory, and what is declared about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpsgd.data.schema import Records, Schema


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test records under a declared schema.

    Attributes:
        train: Inputs [N, *input_shape] and targets [N, ...] of the private records.
        test: The same for the test set, which is held to be public; None without one.
        input_shape: Shape of one input.
        num_classes: Number of classes, labels being int64 in 0..num_classes-1, or -100 where one of
            several per record does not count; None for regression, targets being floating.
        public_size: The number of records that accounting and averaging may use. Declared, because
            under add/remove adjacency the true number is private; the two need not be equal.
        vocab_size: Number of tokens, inputs being int64 ids in 0..vocab_size-1; None for floating
            inputs.
        users: Whose each training record is, [N] int64 of any values, for user-level sampling.
        padding: The token id that fills up short inputs; None where none does.

    Raises:
        ValueError: If a declaration is not positive or records do not match the declarations.
    """

    train: Records = field(repr=False)
    test: Records | None = field(repr=False)
    input_shape: Sequence[int]
    num_classes: int | None
    public_size: int
    vocab_size: int | None = None
    users: Tensor | None = field(default=None, repr=False)
    padding: int | None = None

    def __post_init__(self) -> None:
        schema = Schema(self.input_shape, self.num_classes, self.vocab_size)
        object.__setattr__(self, "input_shape", schema.input_shape)
        size = self.public_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"Expected public_size to be a positive integer, got {size!r}. Declare the number "
                "of records that may be publicly known."
            )
        _check_padding(self.padding, self.vocab_size)
        schema.check(self.train, "training")
        if self.test is not None:
            schema.check(self.test, "test")
        users = self.users
        if users is not None and (users.dtype != torch.int64 or users.shape != (len(self),)):
            raise ValueError(
                "Expected users as one int64 per training record, got "
                f"{users.dtype} {list(users.shape)}."
            )

    def __len__(self) -> int:
        """Returns N, the true number of training records, which is private."""
        return len(self.train[0])

    def take(self, indices: Tensor) -> Records:
        """Returns inputs [n, ...] and targets [n, ...] of the training records at indices [n].

        An index may occur more than once, and there may be none.
        """
        x, y = self.train
        return x.index_select(0, indices), y.index_select(0, indices)


def _check_padding(padding: int | None, vocab_size: int | None) -> None:
    if padding is None:
        return
    if vocab_size is None:
        raise ValueError(f"Expected padding only for token ids, got {padding} without vocab_size.")
    if isinstance(padding, bool) or not isinstance(padding, int) or not 0 <= padding < vocab_size:
        raise ValueError(f"Expected padding within 0..{vocab_size - 1}, got {padding!r}.")
