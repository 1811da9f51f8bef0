"""Standard normals from a cryptographic stream, in pieces that stay in cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dpsgd import rng

_HALF = 1 << 18
_BLOCK = 2 * _HALF
_PIECE = 1 << 18
_ALIGNED = 1024
_HALF_STEP = torch.tensor(2.0**-32, dtype=torch.float32, device="cpu")


class Normals:
    """The normals of any key, by their place in its stream; the memory is used again.

    Box and Muller (1958): the stream consists of blocks of 2^18 radii, which make sqrt(-2 ln u),
    and as many angles. A block's normals are its radii times the cosines of its angles, followed by
    those times the sines. The largest is sqrt(-2 ln 2^-32) = 6.66.
    """

    def __init__(self) -> None:
        self._size = 0
        self._make(_ALIGNED)

    def pieces(self, key: bytes, start: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """Yields the normals [start, start + count) as (place, float32 tensor).

        A tensor is valid until the next one; they come in no particular order. What a place holds
        depends on nothing but the key.

        Args:
            key: 32 bytes, of this stream only.
            start: Place of the first normal.
            count: How many.
        """
        if count == 0:
            return
        self._make(min(_PIECE, -(-count // _ALIGNED) * _ALIGNED))
        for block in range(start // _BLOCK * _BLOCK, start + count, _BLOCK):
            spans = [
                (max(start - at, 0), min(start + count - at, _HALF))
                for at in (block, block + _HALF)
            ]
            first = min(low for low, high in spans if low < high) // _ALIGNED * _ALIGNED
            for piece in range(first, max(high for _, high in spans), self._size):
                cut = [(max(low, piece), min(high, piece + self._size)) for low, high in spans]
                if any(low < high for low, high in cut):
                    for at, normals in self._piece(key, block, cut):
                        yield at - start, normals

    def _make(self, size: int) -> None:
        if size > self._size:
            self._size = 1 << (size - 1).bit_length()
            self._words = [rng.Words(self._size, torch.int32) for _ in range(2)]
            self._memory = torch.empty(3, self._size, dtype=torch.float32, device="cpu")

    def _piece(
        self, key: bytes, block: int, spans: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, Tensor]]:
        """The cosines and the sines of a block that are wanted, some of the same radii."""
        first = min(low for low, high in spans if low < high) // _ALIGNED * _ALIGNED
        size = -(-(max(high for _, high in spans) - first) // _ALIGNED) * _ALIGNED
        radii, angles = (
            words.read(key, block + half + first, size)
            for words, half in zip(self._words, (0, _HALF))
        )
        waves = _box_muller(radii, angles, self._memory[:, :size])
        for (low, high), wave, at in zip(spans, waves, (0, _HALF)):
            if low < high:
                yield block + at + low, wave[low - first : high - first]


def _box_muller(radii: Tensor, angles: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The normals of the cosines and of the sines [n] from words [n]."""
    radius, cosines, sines = memory
    radius.copy_(radii).abs_()
    torch.add(_HALF_STEP, radius, alpha=2.0**-31, out=radius).log_().mul_(-2).sqrt_()
    torch.cos(sines.copy_(angles).mul_(math.pi * 2.0**-31), out=cosines).mul_(radius)
    return cosines, sines.sin_().mul_(radius)
