"""The table of rules: (module type, parameter name) -> rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Inputs = Mapping[str, Any]
"""The arguments of a module's forward by name; tensors are shaped [B, ...]."""

Rule = Callable[[Any, Inputs, Tensor], Tensor]
"""`rule(module, inputs, g [B, ...]) -> per-sample gradient [B, *parameter.shape]`."""

_RULES: dict[tuple[type[nn.Module], str], Rule] = {}
_COSMETIC = {"__init__", "__repr__", "extra_repr", "reset_parameters", "__doc__", "__module__"}


def register(*module_types: type[nn.Module], parameter: str) -> Callable[[Rule], Rule]:
    """Returns a decorator that makes a function the rule of a parameter of these modules.

    Raises:
        ValueError: If there is a rule already.
    """

    def decorate(rule: Rule) -> Rule:
        for module_type in module_types:
            if (module_type, parameter) in _RULES:
                raise ValueError(
                    f"Expected no rule yet for '{parameter}' of {module_type.__name__}, got a "
                    "second one."
                )
            _RULES[module_type, parameter] = rule
        return rule

    return decorate


def lookup(module: nn.Module, parameter: str) -> Rule | None:
    """Returns the rule for a parameter that the module owns, None if there is none.

    A subclass inherits a rule as long as it overrides nothing that computes: a weight-standardised
    subclass of Conv2d, or an instance with a patched forward, has no rule.
    """
    overridden = set(vars(module)) & {"forward"}
    for module_type in type(module).__mro__:
        rule = _RULES.get((module_type, parameter))
        if rule is not None:
            computes = {n for n, v in vars(module_type).items() if callable(v)} | {"forward"}
            return None if overridden & (computes - _COSMETIC) else rule
        overridden |= set(vars(module_type))
    return None
