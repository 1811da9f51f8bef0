"""Putting Opacus on a model for one call, and taking all of it off again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

Mode = Literal["hooks", "functorch", "ew", "ghost"]
"""Opacus's ways of getting per-sample gradients (`ew`: ExpandedWeights)."""


@contextmanager
def attached(model: nn.Module, mode: Mode) -> Iterator[Any]:
    """Gives the callable to pass to the loss, with Opacus on the model; takes it off again.

    Attributes, hooks and gradients of the model are afterwards what they were.
    """
    keys = [(owner, set(vars(owner))) for owner in (*model.modules(), *model.parameters())]
    grads = [(p, p.grad) for p in model.parameters()]
    owned = [(module, dict(module._parameters)) for module in model.modules()]
    attachment: Any = None
    for p, _ in grads:
        p.grad = None
    try:
        with named_errors(mode):
            attachment = _attach(model, mode)
        yield attachment if mode == "ew" else model
    finally:
        if attachment is not None:
            attachment.cleanup()
        for module, parameters in owned:  # ExpandedWeights may leave its own in their place
            module._parameters.update(parameters)
        for p, grad in grads:
            p.grad = grad
        for owner, before in keys:
            for key in set(vars(owner)) - before:
                delattr(owner, key)


def _attach(model: nn.Module, mode: Mode) -> Any:
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    from opacus.grad_sample import GradSampleModuleExpandedWeights
    from opacus.grad_sample.grad_sample_module import GradSampleHooks
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleHooksFastGradientClipping,
    )

    if mode == "ew":
        return GradSampleModuleExpandedWeights(model, loss_reduction="sum")
    if mode == "ghost":
        return _in_any_mode(GradSampleHooksFastGradientClipping)(model, loss_reduction="sum")
    return _in_any_mode(GradSampleHooks)(
        model, loss_reduction="sum", force_functorch=mode == "functorch"
    )


def _in_any_mode(hooks: Any) -> Any:
    """The hooks class, recording in eval mode too (Opacus records in train mode only)."""

    class Recording(hooks):
        def capture_activations_hook(self, module: nn.Module, inputs: Any, output: Any) -> None:
            training = module.training
            module.training = True
            try:
                super().capture_activations_hook(module, inputs, output)
            finally:
                module.training = training

    return Recording


@contextmanager
def named_errors(mode: Mode) -> Iterator[None]:
    """Turns what Opacus or the model raises into a ValueError that says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).split(". ")[0].splitlines()[0].rstrip(".")[:200]
        raise ValueError(
            f"Opacus (mode={mode}) cannot run this model: {type(error).__name__}: {reason}. "
            "Use engine=vmap or engine=loop."
        ) from error
