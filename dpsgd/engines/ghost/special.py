"""Functions that need another treatment than a rule or an expansion of their weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.engines.ghost import recurrent
from dpsgd.engines.ghost.capture import Capture, Split
from dpsgd.engines.ghost.physical import is_wrapped, outside_vmap
from dpsgd.engines.ghost.tape import DIFFERENTIATES

Treatment = Callable[[Capture, Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]


def agreed(capture: Capture, x: Tensor) -> Tensor:
    """Returns the value that all samples have for a tensor.

    Raises:
        Split: If they do not have the same.
    """
    if not capture.samples.holds(x):
        raise ValueError(
            "Expected no control flow on tensors inside a nested torch.func transform, which "
            "engine=ghost cannot follow. Use engine=loop."
        )
    with outside_vmap(), torch.no_grad():
        values = capture.samples.enter(x).detach()
        if not (values == values[:1]).all() and len(values) > 1:
            _, group = values.cpu()[:, None].flatten(1).unique(dim=0, return_inverse=True)
            capture.split = Split(group)
            raise capture.split
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
    given = {**dict(zip(("input", "other", "rtol", "atol", "equal_nan"), args)), **kwargs}
    given = {{"self": "input"}.get(name, name): value for name, value in given.items()}
    first, second = given.pop("input"), given.pop("other")
    if not is_wrapped(first) and not is_wrapped(second):
        return func(*args, **kwargs)
    if func in (torch.allclose, Tensor.allclose):
        return bool(agreed(capture, torch.isclose(first, second, **given).all()))
    return first.shape == second.shape and bool(agreed(capture, (first == second).all()))


def _contains(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """`value in tensor`."""
    x, value = args
    if not any(isinstance(y, Tensor) and is_wrapped(y) for y in args):
        return func(*args, **kwargs)
    return bool(agreed(capture, (x == value).any()))


def _index(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """`x[:, :length]` with a length that belongs to samples, like `int(length)`."""
    x, index, *rest = args
    several = isinstance(index, tuple)
    parts = [_plain_slice(capture, part) for part in (index if several else (index,))]
    return capture.call(func, (x, tuple(parts) if several else parts[0], *rest), kwargs)


def _plain_slice(capture: Capture, part: Any) -> Any:
    if not isinstance(part, slice):
        return part
    bounds = (part.start, part.stop, part.step)
    if not any(isinstance(b, Tensor) and is_wrapped(b) for b in bounds):
        return part
    return slice(*(int(agreed(capture, b)) if isinstance(b, Tensor) else b for b in bounds))


def _autograd_state(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """x.requires_grad, x.grad_fn, x.is_leaf: what holds in memory, not under vmap."""
    x = args[0]
    own = func(x)
    if not capture.samples.holds(x) or _asked_by_a_checkpoint():
        return own
    inside = func(capture.samples.inside(x))
    if func == _IS_LEAF:
        return own and inside
    return own or inside  # what custom functions made has a history of its own


def _asked_by_a_checkpoint() -> bool:
    """Whether a checkpoint that recomputes asks: it keeps what samples see as it is."""
    frame = sys._getframe(1)
    for _ in range(4):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
    return False


def _register_hook(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """A hook on a gradient, which sees that of one sample."""
    x, hook = args
    if not capture.samples.holds(x):
        return func(*args, **kwargs)

    def of_each(g: Tensor) -> Tensor | None:
        with capture:
            changed = hook(capture.samples.like(g, x))
        return None if changed is None else capture.samples.inside_as(changed, x)

    return capture.samples.inside(x).register_hook(of_each)


def _data(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """x.data of a sample."""
    return args[0].detach() if is_wrapped(args[0]) else func(*args, **kwargs)


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
    if capture.samples.holds(x):
        return x
    if is_wrapped(x):
        return func(*args, **kwargs)
    with outside_vmap():
        return func(*args, **kwargs)


def _differentiates(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    if not capture.samples.innermost():
        return func(*args, **kwargs)  # torch.func's own business
    raise ValueError(DIFFERENTIATES)


_IS_LEAF = getattr(Tensor.is_leaf, "__get__")  # noqa: B009

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
            Tensor.__format__,
            torch.is_nonzero,
            Tensor.is_nonzero,
        ),
        _to_python,
    ),
    Tensor.__contains__: _contains,
    **dict.fromkeys((Tensor.__getitem__, Tensor.__setitem__), _index),
    **dict.fromkeys(
        (
            getattr(Tensor.requires_grad, "__get__"),  # noqa: B009  (typed as what it returns)
            getattr(Tensor.grad_fn, "__get__"),  # noqa: B009
            _IS_LEAF,
        ),
        _autograd_state,
    ),
    Tensor.register_hook: _register_hook,
    getattr(Tensor.data, "__get__"): _data,  # noqa: B009
    **dict.fromkeys((Tensor.to, Tensor.contiguous), _layout),
    **dict.fromkeys((torch.select_scatter, Tensor.select_scatter), _select_scatter),
    **dict.fromkeys((torch.roll, Tensor.roll), _roll),
    Tensor.as_strided_: _restride,
    F.triplet_margin_with_distance_loss: _opened,
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
