"""Connections that break between the processes of a job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

_GONE = (
    "A process of this job has ended or cannot be reached, so the others cannot go on. torchrun "
    "says which one it was."
)
_CARRIERS = "gloo", "NCCL"


class LostPeer(RuntimeError):
    """Another process of the job is gone."""


@contextmanager
def lost_peers() -> Iterator[None]:
    """Turns the errors of a broken connection into one that says what happened.

    Raises:
        LostPeer: If a process of the job is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error) or isinstance(error, LostPeer):
            raise
        raise LostPeer(_GONE) from error


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is that of a broken connection."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LostPeer | dist.DistError):
            return True
        if isinstance(cause, RuntimeError) and any(word in str(cause) for word in _CARRIERS):
            return True
        cause = cause.__cause__
    return False
