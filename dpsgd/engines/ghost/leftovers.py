"""A model is left as found: no attribute of it keeps a tensor of samples after the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dpsgd.engines.ghost.physical import is_wrapped


@contextmanager
def no_leftovers(model: nn.Module) -> Iterator[None]:
    """Puts back what modules had before where a forward pass leaves tensors of samples.

    Such tensors are of no use outside: caches, attention maps kept for plotting.

    Raises:
        ValueError: If it was a buffer: state would have been learnt from samples.
    """
    before = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    left: list[str] = []
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            _put_back(vars(module), attributes)
            left += _put_back(module._buffers, buffers)
    if left:
        raise ValueError(
            f"Expected a forward pass to leave buffers as they are, but it assigns samples to "
            f"{left}. Such state would learn from the records without noise."
        )


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    left = [k for k, value in now.items() if isinstance(value, Tensor) and is_wrapped(value)]
    for key in left:
        if key in before:
            now[key] = before[key]
        else:
            del now[key]
    return left
