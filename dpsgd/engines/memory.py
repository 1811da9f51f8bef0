"""Memory that is not there."""

from __future__ import annotations

import torch

_WORDS = "can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that the memory does not suffice."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError | OSError) and any(w in str(error) for w in _WORDS):
            return True
        error = error.__cause__
    return False
