"""Packed sequences: samples of one length at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dpsgd.engines.ghost.branching import agreed
from dpsgd.engines.ghost.capture import Capture
from dpsgd.engines.ghost.physical import is_wrapped


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


TREATMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._VF._pack_padded_sequence: _pack,
    torch._VF._pad_packed_sequence: _unpack,
}
