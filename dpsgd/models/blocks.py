"""The repeated blocks of a model: what is recomputed, or sharded, as a unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the repeated blocks of a model, in its order; none contains another.

    A block is a larger module in an `nn.ModuleList` or `nn.Sequential`, beside or near another of
    its class: `transformer.h` of GPT-2, `blocks` of a Transformer. The outermost ones are taken; a
    container of containers (the stages of a residual network) is looked into. Where nothing is
    repeated, larger modules in containers are the blocks, else the layers in them, else the model's
    children; of these, those with parameters. A pure function of the module tree; the model is
    looked at, not changed.

    Args:
        model: Any module.

    Returns:
        Modules with parameters, each once; empty for a model without any inside.
    """
    larger = list(_larger(model))
    classes = Counter(type(module) for module in larger)
    repeated = [module for module in larger if classes[type(module)] > 1]
    for among in (repeated, larger):
        if among:
            wanted = {id(module) for module in among}
            return list(_outermost(model, lambda module: id(module) in wanted))
    held = {
        id(child)
        for module in model.modules()
        if _is_container(module)
        for child in module.children()
        if _has_parameters(child)
    }
    layers = list(_outermost(model, lambda module: id(module) in held))
    return layers or [child for child in model.children() if _has_parameters(child)]


def _larger(model: nn.Module) -> Iterator[nn.Module]:
    """The modules in containers that consist of modules with parameters; no stages."""
    seen = set()
    for module in model.modules():
        for child in module.children() if _is_container(module) else ():
            if id(child) not in seen and _is_larger(child) and not _is_stage(child):
                seen.add(id(child))
                yield child


def _outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """The wanted modules below a model that are not inside of another one, each once."""
    seen = set()
    stack = [*reversed(list(model.children()))]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if wanted(module):
            yield module
        else:
            stack += reversed(list(module.children()))


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _is_stage(module: nn.Module) -> bool:
    """Whether a module is a container of larger modules."""
    if isinstance(module, nn.ModuleList):
        return True
    return _is_container(module) and any(_is_larger(child) for child in module.children())


def _is_larger(module: nn.Module) -> bool:
    return any(_has_parameters(child) for child in module.children())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
