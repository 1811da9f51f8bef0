"""Functions that need another treatment than a rule or an expansion of their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.engines.ghost import branching, differentiation, packing, recurrent
from dpsgd.engines.ghost.capture import Capture
from dpsgd.engines.ghost.physical import is_wrapped, outside_vmap

Treatment = Callable[[Capture, Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]


def _batch_norm(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Batch statistics couple samples; running ones in eval mode do not."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    training = {**dict(zip(names, args)), **kwargs}.get("training", False)
    if func is torch.batch_norm:  # input, weight, bias, running_mean, running_var, training, ...
        training = args[5] if len(args) > 5 else kwargs["training"]
    if training:
        raise ValueError(
            "Expected no batch normalisation with batch statistics: they mix the samples. Use "
            "GroupNorm (dpsgd.checks.replace_batch_norm does that), or model.eval() where running "
            "statistics are meant."
        )
    return capture.call(func, args, kwargs)


def _opened(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Python functions that call what vmap cannot run."""
    return capture.open(func, args, kwargs)


def _attention(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Scaled dot product attention on the whole batch: vmap has no rule for its fast kernels."""
    args, kwargs = capture.with_expanded_weights(args, kwargs)
    names = ("query", "key", "value", "attn_mask")
    given = {**dict(zip(names, args)), **{k: v for k, v in kwargs.items() if k in names}}
    rest = {key: value for key, value in kwargs.items() if key not in names}
    held = [x for x in given.values() if isinstance(x, Tensor) and is_wrapped(x)]
    if not held or not all(capture.samples.holds(x) for x in held):
        return func(*args, **kwargs)
    query, mask = given["query"], given.pop("attn_mask", None)
    inputs = [capture.samples.enter(x) for x in given.values()]
    with outside_vmap():
        if mask is not None and (is_wrapped(mask) or mask.dim() > 2):
            mask = capture.samples.enter(mask)
            mask = mask.view(len(mask), *[1] * (query.dim() + 1 - mask.dim()), *mask.shape[1:])
            mask = mask.expand(-1, *query.shape[:-2], -1, -1) if query.dim() > 2 else mask
        if query.dim() == 4:  # as kernels know it: [B n, heads, T, d]
            inputs = [x.flatten(0, 1) for x in inputs]
            mask = mask.flatten(0, 1) if mask is not None and mask.dim() > 4 else mask
        attend: Callable[..., Tensor] = F.scaled_dot_product_attention
        out = attend(*inputs, mask, *args[4:], **rest)
        if query.dim() == 4:
            out = out.unflatten(0, (capture.samples.size, -1))
    return capture.samples.leave(out)


def _layout(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """A memory format is one of whole batches: samples do not have it."""
    if is_wrapped(args[0]):
        kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
        if func is Tensor.to and len(args) == 1 and not kwargs:
            return args[0]
    return capture.call(func, args, kwargs)


def _select_scatter(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """By slice_scatter: vmap's own rule is wrong (PyTorch 2.13)."""
    given = {**dict(zip(("input", "src", "dim", "index"), args)), **kwargs}
    x, src, dim, index = (given[name] for name in ("input", "src", "dim", "index"))
    index = index % x.shape[dim]
    with capture:
        return torch.slice_scatter(x, src.unsqueeze(dim), dim, index, index + 1)


def _index_select(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """One index is a row of one; vmap's own rule drops its dimension (PyTorch 2.13)."""
    given = {**dict(zip(("input", "dim", "index"), args)), **kwargs}
    index = given["index"]
    given["index"] = index.unsqueeze(0) if index.dim() == 0 else index
    return capture.call(func, tuple(given[name] for name in ("input", "dim", "index")), {})


def _roll(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """A number has nothing to roll; vmap's own rule rolls over the batch (PyTorch 2.13)."""
    x = args[0] if args else kwargs["input"]
    return x.clone() if x.dim() == 0 else capture.call(func, args, kwargs)


def _restride(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    if is_wrapped(args[0]):
        raise ValueError(
            "engine=ghost cannot run as_strided_ on samples. Use as_strided or engine=loop."
        )
    return func(*args, **kwargs)


SPECIAL: Mapping[Callable[..., Any], Treatment] = {
    **dict.fromkeys((F.batch_norm, torch.batch_norm), _batch_norm),
    **dict.fromkeys(
        (
            F.multi_head_attention_forward,
            F.triplet_margin_with_distance_loss,
            getattr(F, "linear_cross_entropy", F.multi_head_attention_forward),  # torch >= 2.13
        ),
        _opened,
    ),
    **dict.fromkeys((torch.index_select, Tensor.index_select), _index_select),
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((Tensor.to, Tensor.contiguous), _layout),
    **dict.fromkeys((torch.select_scatter, Tensor.select_scatter), _select_scatter),
    **dict.fromkeys((torch.roll, Tensor.roll), _roll),
    Tensor.as_strided_: _restride,
    **branching.TREATMENTS,
    **differentiation.TREATMENTS,
    **packing.TREATMENTS,
    **recurrent.TREATMENTS,
}
"""The table: `treatment(capture, function, args, kwargs)` is what the call returns."""
