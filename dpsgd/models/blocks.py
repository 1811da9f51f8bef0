"""The repeated blocks of a model (placeholder until merge)."""

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the children of the outermost containers that have children with parameters."""
    found = []
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            found += [m for m in child if any(True for _ in m.parameters())]
        else:
            found += blocks_of(child)
    return found
