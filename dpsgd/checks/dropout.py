"""Dropout switched off by a function mode, the model staying in train mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dpsgd.engines.ghost.opened import opened

_DROPOUTS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
)

_DROPOUT_P = 4  # its place among the arguments of scaled_dot_product_attention


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switches dropout off for a while, leaving the model in its mode."""
    recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase) and m.dropout]
    kept = [module.dropout for module in recurrent]
    for module in recurrent:
        module.dropout = 0.0
    try:
        with _NoDropout():
            yield
    finally:
        for module, probability in zip(recurrent, kept):
            module.dropout = probability


class _NoDropout(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            with self:  # checkpoints recompute there, without dropout again
                return opened(func)(*args, **kwargs)
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.multi_head_attention_forward:
            kwargs = {**kwargs, "training": False}  # which means nothing but dropout here
        if kwargs.get("dropout_p"):
            kwargs = {**kwargs, "dropout_p": 0.0}
        if func is F.scaled_dot_product_attention and len(args) > _DROPOUT_P:
            args = (*args[:_DROPOUT_P], 0.0, *args[_DROPOUT_P + 1 :])
        return func(*args, **kwargs)
