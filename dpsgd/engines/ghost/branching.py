"""Python that decides by the values of samples: they must agree, or the batch is split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpsgd.engines.ghost.capture import Capture, Split
from dpsgd.engines.ghost.physical import is_wrapped, outside_vmap


def agreed(capture: Capture, x: Tensor) -> Tensor:
    """Returns the value that all samples have for a tensor.

    Raises:
        Split: If they do not have the same.
    """
    if not capture.samples.holds(x):
        raise ValueError(
            "Expected no control flow on tensors inside a nested torch.func transform, which "
            "engine=ghost cannot follow. Use engine=loop."
        )
    with outside_vmap(), torch.no_grad():
        values = capture.samples.enter(x).detach()
        if not (values == values[:1]).all() and len(values) > 1:
            _, group = values.cpu()[:, None].flatten(1).unique(dim=0, return_inverse=True)
            capture.split = Split(group)
            raise capture.split
        return values[0].clone()


def _to_python(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """`if`, `int()`, `.item()` on what belongs to samples."""
    x = args[0]
    if isinstance(x, Tensor) and is_wrapped(x):
        x = agreed(capture, x)
    return func(x, *args[1:], **kwargs)


def _comparison(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """torch.equal and torch.allclose: one answer about tensors that may belong to samples."""
    given = {**dict(zip(("input", "other", "rtol", "atol", "equal_nan"), args)), **kwargs}
    given = {{"self": "input"}.get(name, name): value for name, value in given.items()}
    first, second = given.pop("input"), given.pop("other")
    if not is_wrapped(first) and not is_wrapped(second):
        return func(*args, **kwargs)
    if func in (torch.allclose, Tensor.allclose):
        return bool(agreed(capture, torch.isclose(first, second, **given).all()))
    return first.shape == second.shape and bool(agreed(capture, (first == second).all()))


def _contains(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """`value in tensor`."""
    x, value = args
    if not any(isinstance(y, Tensor) and is_wrapped(y) for y in args):
        return func(*args, **kwargs)
    return bool(agreed(capture, (x == value).any()))


def _index(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """`x[:, :length]` with a length that belongs to samples, like `int(length)`."""
    x, index, *rest = args
    several = isinstance(index, tuple)
    parts = [_plain_slice(capture, part) for part in (index if several else (index,))]
    return capture.call(func, (x, tuple(parts) if several else parts[0], *rest), kwargs)


def _plain_slice(capture: Capture, part: Any) -> Any:
    if not isinstance(part, slice):
        return part
    bounds = (part.start, part.stop, part.step)
    if not any(isinstance(b, Tensor) and is_wrapped(b) for b in bounds):
        return part
    return slice(*(int(agreed(capture, b)) if isinstance(b, Tensor) else b for b in bounds))


TREATMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(
        (
            Tensor.__bool__,
            Tensor.__int__,
            Tensor.__float__,
            Tensor.__index__,
            Tensor.__complex__,
            Tensor.__format__,
            Tensor.item,
            Tensor.tolist,
            Tensor.is_nonzero,
            torch.is_nonzero,
        ),
        _to_python,
    ),
    **dict.fromkeys((torch.equal, Tensor.equal, torch.allclose, Tensor.allclose), _comparison),
    Tensor.__contains__: _contains,
    **dict.fromkeys((Tensor.__getitem__, Tensor.__setitem__), _index),
}
