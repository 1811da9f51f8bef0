"""What a loss function asks of autograd: answered from memory, where the graph is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpsgd.engines.ghost.capture import Capture
from dpsgd.engines.ghost.physical import is_wrapped, outside_vmap
from dpsgd.engines.ghost.tape import DIFFERENTIATES


def _autograd_state(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """x.requires_grad, x.grad_fn, x.is_leaf: what holds in memory, not under vmap."""
    x = args[0]
    own = func(x)
    if not capture.samples.holds(x) or _asked_by_a_checkpoint():
        return own
    inside = func(capture.samples.inside(x))
    if func == _IS_LEAF:
        return own and inside
    return own or inside  # what custom functions made has a history of its own


def _asked_by_a_checkpoint() -> bool:
    """Whether a checkpoint that recomputes asks: it keeps what samples see as it is."""
    frame = sys._getframe(1)
    for _ in range(4):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
    return False


def _register_hook(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """A hook on a gradient, which sees that of one sample."""
    x, hook = args
    if not capture.samples.holds(x):
        raise ValueError(
            "Expected no hooks on gradients of parameters, of weights computed from them or inside "
            "torch.func transforms: they would not see per-sample gradients. Use engine=loop."
        )
    inner, axis = capture.samples.inside(x), capture.samples.axis(x)
    capture.hooked.append((inner, inner._version))

    def of_each(g: Tensor) -> Tensor | None:  # holds no tensor: the graph, which holds it, would
        with capture:  # never be freed
            changed = hook(capture.samples.like(g, axis))
        return None if changed is None else capture.samples.inside_as(changed, axis)

    return inner.register_hook(of_each)


def _data(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """x.data of a sample."""
    return args[0].detach() if is_wrapped(args[0]) else func(*args, **kwargs)


def _requires_grad(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """A flag on what belongs to samples says nothing here: no gradient of it is asked for."""
    x = args[0]
    if capture.samples.holds(x):
        return x
    if is_wrapped(x):
        return func(*args, **kwargs)
    with outside_vmap():
        return func(*args, **kwargs)


def _differentiates(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    if not capture.samples.innermost():
        return func(*args, **kwargs)  # torch.func's own business
    raise ValueError(DIFFERENTIATES)


_REQUIRES_GRAD, _GRAD_FN, _IS_LEAF, _DATA = (
    getattr(getattr(Tensor, name), "__get__")  # noqa: B009  (typed as what it returns)
    for name in ("requires_grad", "grad_fn", "is_leaf", "data")
)

TREATMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((_REQUIRES_GRAD, _GRAD_FN, _IS_LEAF), _autograd_state),
    _DATA: _data,
    Tensor.register_hook: _register_hook,
    Tensor.requires_grad_: _requires_grad,
    **dict.fromkeys(
        (torch.autograd.grad, torch.autograd.backward, Tensor.backward), _differentiates
    ),
}
