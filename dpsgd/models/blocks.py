"""The repeated blocks of a model: what is recomputed, or sharded, as a unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

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
    wanted = repeated or larger or list(_layers(model))
    return _outermost(model, wanted) or [c for c in model.children() if _has_parameters(c)]


def _larger(model: nn.Module) -> Iterator[nn.Module]:
    """The modules in containers that consist of modules with parameters; no stages."""
    seen = set()
    for module in model.modules():
        for child in module.children() if _is_container(module) else ():
            if id(child) not in seen and _is_larger(child) and not _is_stage(child):
                seen.add(id(child))
                yield child


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules with parameters in containers."""
    for module in model.modules():
        if _is_container(module):
            yield from (child for child in module.children() if _has_parameters(child))


def _outermost(model: nn.Module, wanted: Sequence[nn.Module]) -> list[nn.Module]:
    """Those of the wanted modules below a model that are not inside of another one, each once."""
    ids, found, seen = {id(module) for module in wanted}, [], set()
    stack = list(model.children())[::-1]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if id(module) in ids:
            found.append(module)
        else:
            stack += list(module.children())[::-1]
    return found


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
