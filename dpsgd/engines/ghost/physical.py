"""Between what a sample sees and what memory holds: in and out of `torch.vmap`.

Inside the loss every tensor that belongs to samples looks like that of one sample; in memory it is
[B, ...]. Rules work on the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from dpsgd.engines.ghost.tape import Tap

is_wrapped: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor
"""Whether a tensor belongs to samples (or to a transform of torch.func that runs inside)."""

outside_vmap = torch._C._DisableFuncTorch
"""Context in which operations on tensors [B, ...] are what they are without vmap."""


class Samples:
    """The sample axis of one run of a loss inside `torch.vmap`.

    Attributes:
        size: B.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._level = int(_functorch.current_level())

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor belongs to samples and to nothing that was transformed inside."""
        return is_wrapped(x) and _functorch.maybe_get_level(x) == self._level and self.innermost()

    def innermost(self) -> bool:
        """Whether no other transform of torch.func runs inside."""
        return _functorch.maybe_current_level() == self._level

    def enter(self, x: Tensor) -> Tensor:
        """Returns a sample's tensor as it is in memory, [B, ...]; a constant is expanded to it."""
        if not is_wrapped(x):
            return x.expand(self.size, *x.shape)
        inner, axis = _functorch.get_unwrapped(x), _functorch.maybe_get_bdim(x)
        if axis == 0:
            return inner
        with outside_vmap():
            return inner.movedim(axis, 0)

    def inside(self, x: Tensor) -> Tensor:
        """Returns the very tensor that a sample's tensor stands for, B at any place."""
        return _functorch.get_unwrapped(x)

    def axis(self, x: Tensor) -> int:
        """Returns at which place the very tensor that a sample's tensor stands for has B."""
        return int(_functorch.maybe_get_bdim(x))

    def like(self, x: Tensor, axis: int) -> Tensor:
        """Returns a tensor with B at some place, as samples see it."""
        return _functorch._add_batch_dim(x, axis, self._level)

    def inside_as(self, x: Tensor, axis: int) -> Tensor:
        """Returns what samples see as x with B at some place."""
        return self.enter(x).movedim(0, axis)

    def leave(self, x: Tensor) -> Tensor:
        """Returns a tensor [B, ...] as samples see it."""
        return _functorch._add_batch_dim(x, 0, self._level)


def tap(*args: Any) -> Tensor:
    """Applies `Tap` to tensors [B, ...] inside of vmap, without vmap taking part."""
    return apply_plainly(Tap, *args)


def apply_plainly(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Applies an `autograd.Function` inside of vmap as if there were none."""
    with _single_level():
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


@contextmanager
def _single_level() -> Iterator[None]:
    before = _functorch.get_single_level_autograd_function_allowed()
    _functorch.set_single_level_autograd_function_allowed(True)
    try:
        yield
    finally:
        _functorch.set_single_level_autograd_function_allowed(before)


def plainly(device: str) -> AbstractContextManager[Any]:
    """Without gradients, autocast or inference mode, whatever is on around."""
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(device):
        return _plainly(device)
    return torch.no_grad()


@contextmanager
def _plainly(device: str) -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield
