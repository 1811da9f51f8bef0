"""The noise, drawn and added in one place: where private sums become public."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from dpsgd import rng

_HALF = 1024
_BLOCK = 2 * _HALF
_CHUNK = 64 * _BLOCK
_NOT_COPIED = (
    "Expected one Gaussian per run, got a copy or a pickle: it would add the same noise to another "
    "sum, and carry the key. Make a new Gaussian()."
)


class Gaussian:
    """Gaussian noise from a cryptographic stream, a function of (key, step, flat position) alone.

    Position p is that of a coordinate among all coordinates of all parameters, one after another.
    So the noise is the same for every physical batch size, world size and sharding.

    Args:
        key: 32 secret bytes, by default fresh ones from the operating system. Who knows the key can
            subtract the noise: guard it like the data, use it for one run.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._key = rng.fresh_key() if key is None else rng.check_key(key)
        self._used_below = 0
        self._used: set[int] = set()

    def __copy__(self) -> Gaussian:
        raise ValueError(_NOT_COPIED)

    def __deepcopy__(self, memo: object) -> Gaussian:
        raise ValueError(_NOT_COPIED)

    def __reduce__(self) -> str:
        raise ValueError(_NOT_COPIED)

    def add_(
        self,
        sums: Mapping[str, Tensor],
        std: float,
        step: int,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        """Adds independent N(0, std^2) to each coordinate of each tensor, in place.

        Args:
            sums: Tensors in float32 or float64, in the order of the parameters.
            std: Standard deviation, noise_multiplier * max_grad_norm.
            step: Number of the release. Its noise can be drawn once.
            offsets: Flat position of each tensor's first coordinate, for shards; by default the
                tensors follow one another.

        Raises:
            ValueError: If the step has been used (equal noise on two sums cancels in their
                difference), or an argument makes no sense.
        """
        self._check(sums, std, offsets)
        self._use(step)
        key = rng.derive(self._key, "noise", step)
        position = 0
        for name, total in sums.items():
            start = position if offsets is None else offsets[name]
            noise = normals(key, start, total.numel()).view(total.shape)
            total.add_(noise.to(device=total.device, dtype=total.dtype), alpha=std)
            position += total.numel()

    def _check(
        self, sums: Mapping[str, Tensor], std: float, offsets: Mapping[str, int] | None
    ) -> None:
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"Expected a finite noise std >= 0, got {std}.")
        for name, total in sums.items():
            if total.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"Expected sums in float32 or float64, got {total.dtype} for '{name}': a "
                    "coarser type would round the noise away."
                )
            if offsets is not None and offsets.get(name, -1) < 0:
                raise ValueError(f"Expected a flat offset >= 0 for '{name}' in `offsets`.")
        if offsets is not None:
            spans = sorted((offsets[name], total.numel()) for name, total in sums.items())
            if any(start + size > after for (start, size), (after, _) in pairwise(spans)):
                raise ValueError(
                    "Expected offsets of disjoint shards: overlapping ones share noise."
                )

    def _use(self, step: int) -> None:
        if not isinstance(step, int) or not 0 <= step < 2**63:
            raise ValueError(f"Expected a whole step in [0, 2^63), got {step!r}.")
        if step < self._used_below or step in self._used:
            raise ValueError(
                f"The noise of step {step} has been used. Expected a new step for each release: "
                "equal noise on two sums cancels in their difference."
            )
        self._used.add(step)
        while self._used_below in self._used:
            self._used.remove(self._used_below)
            self._used_below += 1


def normals(key: bytes, start: int, count: int) -> Tensor:
    """Returns the standard normals [start, start + count) of a key's stream, float32 [count].

    Box and Muller (1958) on 32-bit words, in blocks of 1024 radii and 1024 angles, whole arrays at
    a time. The largest value is sqrt(-2 ln 2^-33) = 6.76.
    """
    first, last = start // _BLOCK * _BLOCK, -(-(start + count) // _BLOCK) * _BLOCK
    out = torch.empty(last - first, dtype=torch.float32)
    for begin in range(first, last, _CHUNK):
        size = min(_CHUNK, last - begin)
        _box_muller(
            rng.words(key, begin, size, torch.uint32), out[begin - first : begin - first + size]
        )
    return out[start - first : start - first + count]


def _box_muller(words: Tensor, out: Tensor) -> None:
    uniform = words.to(torch.float32).view(-1, 2, _HALF)
    radius = uniform[:, 0].add(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = uniform[:, 1].mul(math.tau * 2.0**-32)
    blocks = out.view(-1, 2, _HALF)
    torch.mul(radius, angle.cos(), out=blocks[:, 0])
    torch.mul(radius, angle.sin(), out=blocks[:, 1])
