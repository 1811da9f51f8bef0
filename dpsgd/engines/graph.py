"""Walks over the autograd graph: which parameters do the losses reach, and through what?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node


@dataclass(frozen=True, eq=False)
class Region:
    """The part of the graph that one captured call made.

    Attributes:
        output: The node of the call's output.
        inputs: The nodes of its inputs, where the region ends.
        parameters: The ids of the parameters whose use inside the region is captured.
    """

    output: Node
    inputs: Collection[Node]
    parameters: Collection[int]


def check_no_reentrant_checkpoint(losses: Tensor) -> None:
    """Raises if the graph passes a reentrant checkpoint, behind which `autograd.grad` sees nothing.

    Raises:
        ValueError: Naming the other kind of checkpoint.
    """
    stack, seen = [losses.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "Expected torch.utils.checkpoint with use_reentrant=False, got a reentrant one, "
                "which hides its parameters from torch.autograd.grad."
            )
        stack.extend(child for child, _ in node.next_functions)


def leaves(losses: Tensor) -> list[Tensor]:
    """Returns the leaves that require a gradient and that the losses reach."""
    found: dict[int, Tensor] = {}
    stack, seen = [losses.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        stack.extend(child for child, _ in node.next_functions)
    if losses.grad_fn is None and losses.requires_grad:
        found[id(losses)] = losses
    return list(found.values())


def uncaptured(losses: Tensor, regions: Collection[Region], names: Mapping[int, str]) -> list[str]:
    """Returns the names of the parameters that the losses use outside the captured regions.

    Args:
        losses: The losses, still attached to their graph.
        regions: What was captured.
        names: Name of each trainable parameter by its id.
    """
    if losses.grad_fn is None:
        return [names[id(losses)]] if id(losses) in names else []
    by_output = {region.output: region for region in regions}
    found: dict[str, None] = {}
    stack: list[tuple[Node, Region | None]] = [(losses.grad_fn, None)]
    seen = set()
    while stack:
        node, region = stack.pop()
        if node in by_output:
            region = by_output[node]
        elif region is not None and node in region.inputs:
            region = None
        if (node, region) in seen:
            continue
        seen.add((node, region))
        variable = getattr(node, "variable", None)
        captured = region.parameters if region is not None else ()
        if isinstance(variable, Tensor) and id(variable) in names and id(variable) not in captured:
            found[names[id(variable)]] = None
        stack.extend((child, region) for child, _ in node.next_functions if child is not None)
    return list(found)
