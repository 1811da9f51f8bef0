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

    Such tensors are of no use outside: attention maps kept for plotting, features for a probe.

    Raises:
        ValueError: If samples were left in a buffer or a container, where the next batch would
            meet them: state would have been learnt from samples.
    """
    before = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    left: list[str] = []
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            _put_back(vars(module), attributes)
            left += _put_back(module._buffers, buffers)
            left += [key for key, x in vars(module).items() if x and _holds(x) and _emptied(x)]
    if left:
        raise ValueError(
            f"Expected a forward pass to keep no samples, but it leaves some in the buffers or "
            f"containers {left}. The next batch would meet them, without noise."
        )


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    left = [key for key, value in now.items() if isinstance(value, Tensor) and is_wrapped(value)]
    for key in left:
        if key in before:
            now[key] = before[key]
        else:
            del now[key]
    return left


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list)


def _emptied(container: Any) -> bool:
    """Removes samples from a list or a dictionary; whether there were any."""
    if isinstance(container, dict):
        left = [key for key, value in container.items() if _of_samples(value)]
        for key in left:
            del container[key]
        return bool(left)
    if isinstance(container, list) and any(map(_of_samples, container)):
        container[:] = [value for value in container if not _of_samples(value)]
        return True
    return False


def _of_samples(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_of_samples, value))
    return isinstance(value, Tensor) and is_wrapped(value)
