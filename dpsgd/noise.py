"""The noise, drawn and added in one place: where private sums become public."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from dpsgd import rng
from dpsgd.normals import Normals

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
        self._normals = Normals()
        self._lock = threading.Lock()
        self._used_below = 0
        self._used: set[int] = set()

    @property
    def name(self) -> str:
        """What the key is known by, which does not give it away."""
        return rng.derive(self._key, "name of the noise").hex()

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
        with self._lock:
            self._use(step)
            key = rng.derive(self._key, "noise", step)
            for start, total in _spans(sums, offsets):
                flat = total.view(-1) if total.is_contiguous() else total.new_zeros(total.numel())
                for place, noise in self._normals.pieces(key, start, total.numel()):
                    flat[place : place + len(noise)].add_(noise.to(flat), alpha=std)
                if not total.is_contiguous():
                    total.add_(flat.view(total.shape))

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
            filled = {name: total for name, total in sums.items() if total.numel()}
            spans = sorted((offsets[name], total.numel()) for name, total in filled.items())
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


def _spans(
    sums: Mapping[str, Tensor], offsets: Mapping[str, int] | None
) -> Iterator[tuple[int, Tensor]]:
    """Yields (position, tensor), one tensor for all that follow each other in memory as well."""
    position, waiting = 0, None
    for name, total in sums.items():
        start = position if offsets is None else offsets[name]
        position += total.numel()
        if waiting is not None and _follows(waiting, (start, total)):
            waiting = waiting[0], _joined(waiting[1], total)
        else:
            if waiting is not None:
                yield waiting
            waiting = start, total
    if waiting is not None:
        yield waiting


def _follows(first: tuple[int, Tensor], second: tuple[int, Tensor]) -> bool:
    (start, a), (after, b) = first, second
    return (
        after == start + a.numel()
        and a.dtype == b.dtype
        and a.is_contiguous()
        and b.is_contiguous()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and b.storage_offset() == a.storage_offset() + a.numel()
    )


def _joined(a: Tensor, b: Tensor) -> Tensor:
    return a.as_strided((a.numel() + b.numel(),), (1,), a.storage_offset())
