"""What one forward and backward pass leave behind: the calls in which samples met weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from dpsgd.engines.ghost.opened import opened
from dpsgd.engines.sharding import Names
from dpsgd.rules import Call, Rule


@dataclass(frozen=True)
class Site:
    """What is known of a call before the backward pass.

    Attributes:
        rule: The rule of the function.
        arguments: All arguments but those that belong to samples; weights as they were given.
        samples: Names of the arguments that belong to samples.
        wanted: Names of the arguments whose gradients are wanted.
    """

    rule: Rule
    arguments: Mapping[str, Any]
    samples: tuple[str, ...]
    wanted: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """One call with its output gradient."""

    site: Site
    call: Call


class Tape:
    """Leads from the sites of a forward pass to the records of its backward pass.

    Args:
        device: Where the losses will be.
        names: Told of each weight that a call takes.

    Attributes:
        anchor: A leaf that every tapped output depends on: what the backward pass is asked for.
        sites: The calls that the forward pass has made, whether the losses depend on them or not.
    """

    def __init__(self, device: torch.device, names: Names) -> None:
        self._names = names
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.sites: list[Site] = []
        self._take: Callable[[Record], None] | None = None

    def site(self, rule: Rule, arguments: Mapping[str, Any], samples: Any, wanted: Any) -> Site:
        """Returns the site of a call that is being made, see `Site`."""
        for name in wanted:
            self._names.note(arguments[name])
        self.sites.append(Site(rule, arguments, tuple(samples), tuple(wanted)))
        return self.sites[-1]

    def backward(
        self, losses: Tensor, mode: TorchFunctionMode, take: Callable[[Record], None]
    ) -> None:
        """Runs the one backward pass from the losses [B] of independent samples.

        Args:
            losses: The losses, attached to their graph.
            mode: On meanwhile, so that checkpoints recompute under it.
            take: Called with each call that the losses depend on, as soon as its gradient is there.
        """
        if not losses.requires_grad:
            return
        self._take = take
        total = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))
        seed = torch.ones_like(total)
        with mode:  # opened, so that the mode does not see this call itself
            opened(torch.autograd.grad)(total, self.anchor, seed, allow_unused=True)

    def note(self, site: Site, saved: tuple[Tensor, ...], g: Tensor) -> None:
        """Hands a record on.

        Raises:
            ValueError: If it is not this tape's own backward pass that runs.
        """
        if self._take is None:
            raise ValueError(DIFFERENTIATES)
        samples = {name: x.detach() for name, x in zip(site.samples, saved, strict=True)}
        call = Call({**site.arguments, **samples}, frozenset(site.samples), g.detach())
        self._take(Record(site, call))


DIFFERENTIATES = (
    "Expected a loss that does not differentiate inside (torch.autograd.grad or backward in the "
    "model or loss function), which engine=ghost cannot follow. Use engine=loop."
)


class Tap(torch.autograd.Function):
    """The identity; its backward notes what the call saved and the gradient of its output.

    What is saved goes through autograd, so that checkpoints recompute it, hooks on saved tensors
    see it, and a change in place is noticed.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, output: Tensor, anchor: Tensor, tape: Tape, site: Site, *saved: Tensor
    ) -> Tensor:
        """Returns the output as a tensor of its own, which may be changed in place."""
        ctx.tape, ctx.site = tape, site  # type: ignore[attr-defined]
        ctx.save_for_backward(*saved)
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Notes the call and passes the gradient on."""
        saved = ctx.saved_tensors  # once: reading it again would recompute a checkpoint again
        with torch._C.DisableTorchFunction():
            ctx.tape.note(ctx.site, saved, g)
        return (g, None, None, None, *(None for _ in saved))
