"""A kernel that slides over pixels: its windows, and their inner products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpsgd.rules.rows import chunks, wide


@dataclass(frozen=True)
class Sliding:
    """What slides over what.

    Attributes:
        over: What the kernel slides over, padded, [B, n, c, *space].
        at: The other factor at each place of the kernel, [B, n, p, *places].
        kernel: Size of the kernel, per dimension of space.
        stride: Step from place to place.
        dilation: Step inside the kernel.
        groups: Groups of channels.
    """

    over: Tensor
    at: Tensor
    kernel: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def rows(self, index: slice) -> Sliding:
        """Returns the same for some of the samples."""
        return replace(self, over=self.over[index], at=self.at[index])

    @property
    def window_bytes(self) -> int:
        """The size of all windows of a sample."""
        pixels = self.at[0, :, 0].numel() * math.prod(self.kernel)
        return pixels * self.over.shape[2] * self.over.element_size()

    @property
    def lag_bytes(self) -> int:
        """The size of the Gram matrices of a sample, of its pixels and of its places."""
        pixels, places = self.over[0, :, 0].numel(), self.at[0, :, 0].numel()
        return (pixels**2 + 2 * places**2) * self.groups * self.over.element_size()

    def operands(self) -> tuple[Tensor, Tensor]:
        """Returns windows [B groups, T, d] and places [B groups, T, p], each of one group."""
        windows = self._by_kernel()
        size = len(windows) * self.groups
        a = windows.reshape(size, -1, self.at[0, :, 0].numel())
        return a.mT, self._by_group(self.at).mT

    def products(self, channels_last: bool = False) -> Tensor:
        """Returns sum_t g_t a_t^T [B groups, p, d], the windows copied for some samples at a time.

        Args:
            channels_last: Channels are last in a window, so that they are copied in runs; for one
                group only.
        """
        windows = self._windows(last=True) if channels_last else self._by_kernel()
        g = self._by_group(self.at)
        places = g.shape[2]
        d = windows[0].numel() // (places * self.groups)
        formed = g.new_empty(len(g), g.shape[1], d)
        copied: Tensor | None = None
        for rows in chunks(len(windows), self.window_bytes):
            if copied is None:
                copied = torch.empty_like(windows[rows], memory_format=torch.contiguous_format)
            a = copied[: rows.stop - rows.start].copy_(windows[rows])
            a = a.view(-1, places, d) if channels_last else a.view(-1, d, places).mT
            some = slice(rows.start * self.groups, rows.stop * self.groups)
            torch.bmm(g[some], a, out=formed[some])
        return formed

    def _by_kernel(self) -> Tensor:
        """The windows as a view, [B, groups, c / groups, *kernel, n, *places]."""
        space = len(self.kernel)
        split = self._windows().unflatten(2, (self.groups, -1))
        order = (0, 2, 3, *range(4 + space, 4 + 2 * space), 1, *range(4, 4 + space))
        return split.permute(order)

    def _windows(self, last: bool = False) -> Tensor:
        """The windows as a view, [B, n, c, *places, *kernel] or [B, n, *places, *kernel, c]."""
        over = self.over.movedim(2, -1).contiguous() if last else self.over
        channels = slice(-1, None) if last else slice(2, 3)
        pixels = over.stride()[2:-1] if last else over.stride()[3:]
        shape = [*self.at.shape[3:], *self.kernel]
        steps = [step * s for step, s in zip(pixels, self.stride, strict=True)]
        steps += [step * d for step, d in zip(pixels, self.dilation, strict=True)]
        ends = over.shape[channels], over.stride()[channels]
        shape = [*shape, *ends[0]] if last else [*ends[0], *shape]
        steps = [*steps, *ends[1]] if last else [*ends[1], *steps]
        return over.as_strided(
            (*over.shape[:2], *shape), (*over.stride()[:2], *steps), over.storage_offset()
        )

    def gram_of_pixels(self) -> Tensor:
        """Returns sum_ts <a_t, a_s> <g_t, g_s> [B] over windows a_t, without copying any.

        Two windows' inner product is the sum of those of the pixels at each place of the kernel, so
        that all of them are sums over shifted views of one Gram matrix of pixels (a lag each).
        """
        g = self._by_group(self.at)
        places = torch.bmm(g.transpose(1, 2), g)
        a = self._by_group(self.over)
        pixels = torch.bmm(a.transpose(1, 2), a)
        n, count = self.over.shape[1], a.shape[2]
        axes = [math.prod(self.over.shape[3 + i + 1 :]) for i in range(len(self.kernel))]
        moves = [count // n, *(step * s for step, s in zip(axes, self.stride))]
        shape = (n, *self.at.shape[3:])
        steps = (count**2, *(count * move for move in moves), *moves)
        total = torch.zeros_like(places).view(len(places), *shape, *shape)
        for place in itertools.product(*map(range, self.kernel)):
            lag = sum(i * step * d for i, step, d in zip(place, axes, self.dilation, strict=True))
            total += pixels.as_strided(total.shape, steps, lag * (count + 1))
        products = places.mul_(total.view(places.shape))
        return products.sum((1, 2), dtype=wide(products)).view(-1, self.groups).sum(1)

    def _by_group(self, x: Tensor) -> Tensor:
        """[B, n, c, *space] as [B groups, c / groups, n space]."""
        split = x.unflatten(2, (self.groups, -1)).movedim(1, 3)
        return split.reshape(len(x) * self.groups, split.shape[2], -1)
