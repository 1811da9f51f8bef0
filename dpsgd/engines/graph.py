"""Walks over the autograd graph: which parameters do the losses reach, and through what?"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
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
    if any(node.name() == "CheckpointFunctionBackward" for node in _nodes(losses)):
        raise ValueError(
            "Expected torch.utils.checkpoint with use_reentrant=False, got a reentrant one, "
            "which hides its parameters from torch.autograd.grad."
        )


def leaves(losses: Tensor) -> list[Tensor]:
    """Returns the leaves that require a gradient and that the losses reach."""
    if losses.grad_fn is None:
        return [losses] if losses.requires_grad else []
    variables = (getattr(node, "variable", None) for node in _nodes(losses))
    return list({id(v): v for v in variables if isinstance(v, Tensor)}.values())


def _nodes(losses: Tensor) -> Iterator[Node]:
    """The nodes of the graph of a tensor, each once."""
    stack, seen = [losses.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(child for child, _ in node.next_functions)


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
