"""Opens Python functions of PyTorch down to the built-in ones that rules are for."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any


def _asks_nobody(*args: Any, **kwargs: Any) -> bool:
    return False


_QUESTIONS = {
    "has_torch_function": _asks_nobody,
    "has_torch_function_unary": _asks_nobody,
    "has_torch_function_variadic": _asks_nobody,
}


def can_open(function: Callable[..., Any]) -> bool:
    """Whether a function is one of torch.nn.functional's that are written in Python."""
    return isinstance(function, types.FunctionType) and function.__module__ == "torch.nn.functional"


@cache
def opened(function: types.FunctionType) -> Callable[..., Any]:
    """Returns the function as it is when no function mode wants to see the call itself.

    Called as it is with a mode on, it would ask the mode, which would call it, and so on for ever.
    What it calls in turn does ask.
    """
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **_QUESTIONS},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
