"""Functions that need another treatment than a rule or an expansion of their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.engines.ghost import recurrent
from dpsgd.engines.ghost.capture import Capture
from dpsgd.engines.ghost.physical import is_wrapped, outside_vmap
from dpsgd.engines.ghost.tape import DIFFERENTIATES

Treatment = Callable[[Capture, Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]


class Split(BaseException):
    """The samples disagree about control flow.

    Attributes:
        group: A number for each sample [B]; those with the same agree.
    """

    def __init__(self, group: Tensor) -> None:
        super().__init__()
        self.group = group


def agreed(capture: Capture, x: Tensor) -> Tensor:
    """Returns the value that all samples have for a tensor.

    Raises:
        Split: If they do not have the same.
    """
    capture.branched = True
    if not capture.samples.holds(x):
        raise ValueError(
            "Expected no control flow on tensors inside a nested torch.func transform, which "
            "engine=ghost cannot follow. Use engine=loop."
        )
    with outside_vmap(), torch.no_grad():
        values = capture.samples.enter(x).detach()
        if not (values == values[:1]).all() and len(values) > 1:
            _, group = values.cpu()[:, None].flatten(1).unique(dim=0, return_inverse=True)
            raise Split(group)
        return values[0].clone()


def _to_python(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """`if`, `int()`, `.item()` on what belongs to samples."""
    x = args[0]
    if isinstance(x, Tensor) and is_wrapped(x):
        x = agreed(capture, x)
    return func(x, *args[1:], **kwargs)


def _comparison(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """torch.equal and torch.allclose: one answer about tensors that may belong to samples."""
    both = [x for x in args if isinstance(x, Tensor)]
    if not any(is_wrapped(x) for x in both):
        return func(*args, **kwargs)
    each = torch.isclose if func in (torch.allclose, Tensor.allclose) else torch.eq
    if both[0].shape != both[1].shape and each is torch.eq:
        return False
    return bool(agreed(capture, each(*args, **kwargs).all()))


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


def _pack(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """pack_padded_sequence: samples of one length at a time."""
    x, lengths, batch_first = args
    if is_wrapped(lengths):
        lengths = agreed(capture, lengths)
    if not is_wrapped(x):
        return func(x, lengths, batch_first)
    x = x if not batch_first else x.transpose(0, 1)
    longest = int(lengths[0])
    if int(lengths[-1]) != longest:
        raise ValueError(
            "Expected sequences of one length within a sample, got a sample that packs several: "
            f"{lengths.tolist()}. Use engine=loop."
        )
    packed = x[:longest].reshape(longest * x.shape[1], *x.shape[2:])
    return packed, torch.full((longest,), x.shape[1])


def _unpack(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """pad_packed_sequence, the inverse of `_pack`."""
    data, batch_sizes, batch_first, value, total = args
    if not is_wrapped(data):
        return func(*args, **kwargs)
    length, each = len(batch_sizes), int(batch_sizes[0])
    x = data.reshape(length, each, *data.shape[1:])
    missing = max(total - length, 0)
    x = F.pad(x, [0, 0] * (x.dim() - 1) + [0, missing], value=value)
    return x.transpose(0, 1) if batch_first else x, torch.full((each,), length)


def _requires_grad(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """A flag on what belongs to samples says nothing here: no gradient of it is asked for."""
    x = args[0]
    return x if isinstance(x, Tensor) and is_wrapped(x) else func(*args, **kwargs)


def _differentiates(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    raise ValueError(DIFFERENTIATES)


SPECIAL: Mapping[Callable[..., Any], Treatment] = {
    **dict.fromkeys(
        (
            Tensor.__bool__,
            Tensor.__int__,
            Tensor.__float__,
            Tensor.__index__,
            Tensor.__complex__,
            Tensor.item,
            Tensor.tolist,
            torch.is_nonzero,
            Tensor.is_nonzero,
        ),
        _to_python,
    ),
    **dict.fromkeys((torch.equal, Tensor.equal, torch.allclose, Tensor.allclose), _comparison),
    **dict.fromkeys((F.batch_norm, torch.batch_norm), _batch_norm),
    F.multi_head_attention_forward: _opened,
    Tensor.requires_grad_: _requires_grad,
    F.scaled_dot_product_attention: _attention,
    torch._VF._pack_padded_sequence: _pack,
    torch._VF._pad_packed_sequence: _unpack,
    **dict.fromkeys(
        (torch.autograd.grad, torch.autograd.backward, Tensor.backward), _differentiates
    ),
    **recurrent.TREATMENTS,
}
