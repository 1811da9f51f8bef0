"""Augmentation multiplicity: several views of each sample, averaged before the clip."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.engines import Batch


@dataclass(frozen=True)
class Augmentation(ABC):
    """K random views of each sample (De et al. 2022, arXiv:2204.13650).

    The loss of a sample is the mean over its views (`dpsgd.losses.MeanOfViews`), so that a sample
    still has one gradient and one clip: sensitivity, sampling and accounting are what they were.
    What is random in a view is a function of the seed, the step and the sample's own position: no
    physical batch size, number of processes or other record changes it.

    Attributes:
        multiplicity: K, the number of views.

    Raises:
        ValueError: If K is no positive integer.
    """

    multiplicity: int

    numbers: ClassVar[int] = 0
    """How many random numbers a view takes."""

    def __post_init__(self) -> None:
        k = self.multiplicity
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"Expected multiplicity to be a positive integer, got {k!r}.")

    @abstractmethod
    def views(self, x: Tensor, random: Tensor) -> Tensor:
        """Returns the views [n, K, *shape] of inputs [n, *shape].

        Args:
            x: Inputs.
            random: [n, K, numbers], independent and uniform in [0, 1).

        Raises:
            ValueError: If it cannot make views of inputs of this shape.
        """

    def __call__(self, batch: Batch, seed: int, step: int, rows: Tensor) -> Batch:
        """Returns a batch `(x, ...)` with x [n, *shape] replaced by its views [n, K, *shape].

        Args:
            batch: A tuple whose first tensor holds the inputs, [n, *shape], or [n, k, *shape] of k
                records of each user.
            seed: The run's.
            step: Number of the step.
            rows: Which records the inputs are, [n] or [n, k] int64.
        """
        x, *rest = batch
        random = uniforms(seed, step, rows.flatten(), self.multiplicity * self.numbers)
        random = random.view(-1, self.multiplicity, self.numbers).to(x.device)
        views = self.views(x.flatten(0, rows.dim() - 1), random)
        return views.view(*rows.shape, *views.shape[1:]), *rest


@dataclass(frozen=True)
class CropFlip(Augmentation):
    """Views of images, shifted at random and mirrored, as De et al. (2022), arXiv:2204.13650.

    Attributes:
        multiplicity: K, the number of views.
        padding: The most pixels that a view is shifted by, each way; what comes in from outside
            is the image reflected at its border.
        flip: Whether half of the views are mirrored left to right (not for digits and letters).

    Raises:
        ValueError: If padding is negative.
    """

    padding: int
    flip: bool

    numbers: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.padding, bool) or not isinstance(self.padding, int) or self.padding < 0:
            raise ValueError(f"Expected padding >= 0, a whole number, got {self.padding!r}.")

    def views(self, x: Tensor, random: Tensor) -> Tensor:
        """Returns the views [n, K, ...] of images [n, C, H, W] or [n, H, W]."""
        images = _images(x)
        if min(x.shape[-2:]) <= self.padding:
            raise ValueError(
                f"Expected images of more than padding={self.padding} pixels each way, got "
                f"{list(x.shape[-2:])}. Lower augmentation.padding."
            )
        (n, channels, height, width), k = images.shape, self.multiplicity
        down, right = (random[..., :2] * (2 * self.padding + 1)).long().unbind(-1)  # [n, K]
        columns = right[..., None] + torch.arange(width, device=x.device)  # [n, K, W]
        rows = down[..., None] + torch.arange(height, device=x.device)
        if self.flip:
            columns = torch.where((random[..., 2] < 0.5)[..., None], columns.flip(-1), columns)
        padded = F.pad(images, [self.padding] * 4, mode="reflect")
        shape = (n, k, channels, height, padded.shape[-1])
        taken = padded[:, None].expand(n, k, *padded.shape[1:])
        taken = taken.gather(3, rows[:, :, None, :, None].expand(shape))
        taken = taken.gather(4, columns[:, :, None, None, :].expand(n, k, channels, height, width))
        return taken.view(n, k, *x.shape[1:])


@dataclass(frozen=True)
class Affine(Augmentation):
    """Views of images, turned, scaled and moved a little, by bilinear interpolation.

    Simard et al. (2003), ICDAR, for handwritten digits. What comes in from outside is the pixel at
    the border.

    Attributes:
        multiplicity: K, the number of views.
        degrees: The largest angle, each way.
        scale: The largest change of size, as a share, each way.
        shift: The largest move, in pixels, each way.
    """

    degrees: float
    scale: float
    shift: float

    numbers: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, limit in (
            ("degrees", self.degrees, 180),
            ("scale", self.scale, 0.5),
            ("shift", self.shift, math.inf),
        ):
            if not 0 <= value <= limit or math.isinf(value):
                raise ValueError(f"Expected 0 <= {name} <= {limit}, got {value}.")

    def views(self, x: Tensor, random: Tensor) -> Tensor:
        """Returns the views [n, K, ...] of images [n, C, H, W] or [n, H, W]."""
        images = _images(x)
        n, k = random.shape[:2]
        height, width = images.shape[-2:]
        images = images.to(torch.promote_types(x.dtype, torch.float32))
        signed = (2 * random - 1).flatten(0, 1).to(images.dtype)
        angle, size, down, right = signed.unbind(-1)
        angle, size = angle * math.radians(self.degrees), 1 + size * self.scale
        cos, sin = angle.cos() / size, angle.sin() / size
        right, down = 2 * self.shift / width * right, 2 * self.shift / height * down
        to_x = torch.stack([cos, -sin * height / width, right], -1)
        to_y = torch.stack([sin * width / height, cos, down], -1)
        shape = [n * k, *images.shape[1:]]
        grid = F.affine_grid(torch.stack([to_x, to_y], 1), shape, align_corners=False)
        copies = images.repeat_interleave(k, 0)
        views = F.grid_sample(copies, grid, padding_mode="border", align_corners=False)
        return views.view(n, k, *x.shape[1:]).to(x.dtype)


def none() -> None:
    """Returns no augmentation: the records as they are."""


def uniforms(seed: int, step: int, rows: Tensor, count: int) -> Tensor:
    """Returns numbers in [0, 1) that are a function of seed, step and record, float32 [n, count].

    A counter that is mixed by SplitMix64 (Steele et al. 2014, OOPSLA): not secret, not for noise.

    Args:
        seed: Any integer.
        step: Number of the step.
        rows: Which records, [n] int64.
        count: Numbers per record.
    """
    stream = _mixed(torch.tensor(seed)) + step
    counters = rows.cpu()[:, None] * count + torch.arange(count)
    bits = _mixed(_mixed(stream) + counters)
    return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24


def _mixed(words: Tensor) -> Tensor:
    """The output function of SplitMix64 on int64 words, which wrap around."""
    words = words * _GOLDEN
    words = (words ^ ((words >> 30) & 0x3FFFFFFFF)) * _FIRST
    words = (words ^ ((words >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return words ^ ((words >> 31) & 0x1FFFFFFFF)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _images(x: Tensor) -> Tensor:
    """The images [n, C, H, W] that inputs [n, C, H, W] or [n, H, W] are.

    Raises:
        ValueError: If they are no images.
    """
    if x.dim() not in (3, 4) or not x.is_floating_point():
        raise ValueError(
            f"Expected images [C, H, W] or [H, W] to make views of, got inputs "
            f"{list(x.shape[1:])} of {x.dtype}. Use augmentation=none."
        )
    return x if x.dim() == 4 else x.unsqueeze(1)
