"""Building what a configuration names by `_target_`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from dpsgd.models.trainable import train_only
from dpsgd.settings import COMPONENTS

_OURS = "init_from", "trainable"
_RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_", *_OURS}


def build(config: DictConfig, names: tuple[str, ...] = COMPONENTS) -> dict[str, Any]:
    """Returns the named components of a configuration, data first.

    Components that need the model, its parameters or the key are partial functions of them. This is
    the only call of Hydra's `instantiate`.

    Args:
        config: A resolved configuration.
        names: Which components to build.

    Raises:
        ValueError: If a component cannot be built; it names the setting.
    """
    parts = {}
    for name in names:
        arguments = _arguments(config, name)
        try:
            parts[name] = instantiate(arguments, _convert_="all")
        except InstantiationException as error:
            cause = error.__cause__ or error
            words = cause if isinstance(cause, ValueError) else f"{type(cause).__name__}: {cause}"
            raise ValueError(f"Cannot build {name}: {words}") from error
        trainable = config[name].get("trainable")
        if trainable is not None and isinstance(parts[name], nn.Module):
            train_only(parts[name], trainable)
    return parts


def build_model(config: DictConfig) -> nn.Module:
    """Returns an untrained model of a configuration; no data is loaded."""
    return build(config, ("model",))["model"]


def finished(name: str, partial: Any, kind: type, *arguments: Any, **options: Any) -> Any:
    """Returns a component that needed something that was not there before.

    Args:
        name: Its section of the configuration.
        partial: What `build` gave for it.
        kind: What it must be.
        arguments: What it needed.
        options: The same by name.

    Raises:
        ValueError: If it cannot be built, or is something else.
    """
    try:
        made = partial(*arguments, **options)
    except ValueError as error:
        raise ValueError(f"Cannot build {name}: {error}") from error
    except Exception as error:  # of a stranger's code, or of an argument of a wrong type
        raise ValueError(f"Cannot build {name}: {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise ValueError(f"Expected {name} to be a {kind.__name__}, got {type(made).__name__}.")
    return made


def takes(component: Any, name: str) -> bool:
    """Whether a component that is not finished takes an argument of this name."""
    try:
        return name in inspect.signature(component).parameters
    except (TypeError, ValueError):  # builtins do not tell
        return False


def _arguments(config: DictConfig, name: str) -> dict[str, Any]:
    """The section of a component with interpolations resolved, checked against its target."""
    try:
        resolved: Any = OmegaConf.to_container(config[name], resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        missing = sorted(OmegaConf.missing_keys(config[name])) or [_first_line(error)]
        settings = ", ".join(f"{name}.{key.removeprefix(f'{name}.')}" for key in missing)
        raise ValueError(f"These settings have no default: {settings}.") from error
    if not isinstance(resolved, dict) or "_target_" not in resolved:
        raise ValueError(f"Expected '{name}' to name a component by _target_, got {resolved!r}.")
    for ours in _OURS:
        resolved.pop(ours, None)
    target = _locate(name, resolved["_target_"])
    _check_arguments(name, target, resolved)
    return resolved


def _locate(name: str, path: str) -> Any:
    try:
        return get_object(path)
    except Exception as error:
        module, _, last = path.rpartition(".")
        names = dir(sys.modules.get(module))
        close = difflib.get_close_matches(last.lower(), {n.lower() for n in names}, n=3)
        near = [known for word in close for known in names if known.lower() == word]
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        cause = _first_line(error.__cause__ or error)
        raise ValueError(f"Cannot find {name}._target_={path}: {cause}.{hint}") from error


def _check_arguments(name: str, target: Any, given: Mapping[str, Any]) -> None:
    """Raises for arguments that the target does not take, or scalars of a wrong type."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # builtins do not tell: the call itself will
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    hints = _hints(target)
    for key, value in given.items():
        if key in _RESERVED:
            continue
        if key not in parameters:
            near = difflib.get_close_matches(key, parameters, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(
                f"{given['_target_']} takes no '{key}' ({name}.{key}).{hint} It takes "
                f"{', '.join(parameters)}."
            )
        allowed = _scalar_types(hints.get(key))
        if allowed and not isinstance(value, dict) and not _fits(value, allowed):
            words = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
            raise ValueError(f"Expected {name}.{key} to be {words}, got {value!r}.")


def _hints(target: Any) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    if dataclasses.is_dataclass(target):  # fields of a base are resolved in the base's module
        function = target
    try:
        return typing.get_type_hints(function)
    except Exception:  # hints of a stranger's code that cannot be evaluated bind nobody
        return {}


def _scalar_types(hint: Any) -> tuple[type, ...]:
    """The scalar types that a hint admits; empty if it admits anything else but tensors."""
    members = typing.get_args(hint) if _is_union(hint) else (hint,)
    members = tuple(member for member in members if member is not torch.Tensor)
    scalars = {int, float, bool, str, type(None)}
    return tuple(members) if all(member in scalars for member in members) else ()


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def _fits(value: Any, allowed: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int) and float in allowed:
        return True
    return isinstance(value, allowed)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
