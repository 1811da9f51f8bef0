"""What a private step refuses: models, optimizers, masks and jobs that it cannot be exact with."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpsgd.engines import Engine
from dpsgd.parallel import Parallel, single


def check_no_batch_statistics(model: nn.Module) -> None:
    """Raises for batch normalisation that learns from the batch, whatever the engine does."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"Expected no batch normalisation with batch statistics, got '{path}' "
                f"({type(module).__name__}): it mixes the samples, and its running statistics "
                "would learn from them without noise. Use GroupNorm; "
                "dpsgd.checks.replace_batch_norm does that."
            )


def mask_column(mask: Tensor | None, weights: Tensor) -> Tensor:
    """The mask as [B, 1] of 0 and 1 beside norms or weights [B, K]; all 1 without one."""
    if mask is None:
        return weights.new_ones(len(weights), 1)
    if mask.shape != weights.shape[:1]:
        raise ValueError(f"Expected a mask [{len(weights)}], got {list(mask.shape)}.")
    column = mask.to(device=weights.device, dtype=weights.dtype)
    if not ((column == 0) | (column == 1)).all():
        raise ValueError("Expected a mask of 0 and 1: other values would undo the clipping.")
    return column[:, None]


def check_optimizer(optimizer: Any, engine: Engine) -> None:
    """Raises unless an optimizer takes dense gradients, of all trainable parameters of the engine.

    Raises:
        ValueError: Saying what is wrong with it.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"Expected a torch.optim optimizer, got {type(optimizer).__name__}.")
    if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
        raise ValueError(
            "Expected an optimizer that takes one dense gradient per step, got "
            f"{type(optimizer).__name__}. Use SGD or Adam."
        )
    for group in optimizer.param_groups:
        wrong = {k: v for k, v in group.items() if isinstance(v, float) and not math.isfinite(v)}
        if wrong:
            raise ValueError(f"Expected finite figures of the optimizer, got {wrong}.")
    parameters = engine.parameters
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in parameters.items() if id(p) not in owned]
    if missing:
        raise ValueError(
            f"Expected the optimizer to own every trainable parameter, it lacks {missing}. Pass "
            "model.parameters() to it, or freeze them."
        )
    frozen = {id(p) for p in engine.model.parameters()} - {id(p) for p in parameters.values()}
    if owned - frozen - {id(p) for p in parameters.values()}:
        raise ValueError("Expected the optimizer to own parameters of the engine's model only.")


def alone() -> Parallel:
    """The way of one process, if this is the only one: others would get the same noise."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"Expected parallel=dpsgd.parallel.ddp() or fsdp() in a job of {dist.get_world_size()} "
            "processes: each would release sums of its own, with the same noise if they share a "
            "key. Say parallel=dpsgd.parallel.single() if it is meant."
        )
    return single()
