"""Handcrafted features: a fixed bank of wavelets before a linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd.models.arguments import image_shape, num_outputs, positive


class FilterBank(nn.Module):
    """Moduli of Gabor wavelets, averaged locally and normalised within each sample, then linear.

    The first layer of a scattering transform (Bruna and Mallat (2013), arXiv:1203.1513), which
    trains privately better than what small networks learn from noisy gradients: Tramèr and Boneh
    (2021), arXiv:2011.11660. Nothing of the bank is fitted to data. Group normalisation without
    parameters takes the place of statistics, which would have to be public or paid for.

    Args:
        input_shape: Shape of one input, [C, H, W], or [H, W] for one channel.
        num_classes: Number of outputs; None is one output, for regression.
        orientations: Directions of the wavelets.
        scales: Octaves; the wavelets of octave j are 2^j times as long.
        pool: Side of the windows over which moduli are averaged, and their stride.
        groups: Normalisation groups of the features; they divide C (1 + orientations * scales).

    Raises:
        ValueError: If an argument is out of range or pooling leaves nothing of the image.
    """

    bank: Tensor

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int | None,
        orientations: int = 8,
        scales: int = 1,
        pool: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        depth, height, width = image_shape(input_shape)
        self.pool = positive("pool", pool)
        self.register_buffer(
            "bank", gabor(positive("orientations", orientations), positive("scales", scales))
        )
        channels = depth * (1 + orientations * scales)
        rows, columns = height // pool, width // pool
        if not rows or not columns:
            raise ValueError(f"Expected pool <= {min(height, width)}, got {pool}.")
        if channels % positive("groups", groups):
            raise ValueError(f"Expected groups to divide {channels} features, got {groups}.")
        self.norm = nn.GroupNorm(groups, channels, affine=False)
        self.head = nn.Linear(channels * rows * columns, num_outputs(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scores [B, num_classes] of images [B, C, H, W] or [B, H, W]."""
        images = x if x.dim() == 4 else x.unsqueeze(1)
        return self.head(self.norm(self.features(images)).flatten(1))

    def features(self, images: Tensor) -> Tensor:
        """Returns averages [B, C (1 + L S), H / pool, W / pool] of images [B, C, H, W]."""
        channels = images.shape[1]
        side = self.bank.shape[-1]
        padded = F.pad(images, [side // 2] * 4, mode="replicate")
        bank = self.bank.repeat(channels, 1, 1).unsqueeze(1).to(images.dtype)
        real, imaginary = F.conv2d(padded, bank, groups=channels).unflatten(1, (-1, 2)).unbind(2)
        moduli = (real.square() + imaginary.square() + 1e-8).sqrt()
        return F.avg_pool2d(torch.cat([images, moduli], 1), self.pool)


def gabor(orientations: int, scales: int) -> Tensor:
    """Returns Gabor wavelets of zero mean and unit norm, real and imaginary parts in turn.

    Args:
        orientations: L directions, evenly over half a turn.
        scales: S octaves.

    Returns:
        [2 L S, k, k] with an odd k.
    """
    reach = 2 * 2 ** (scales - 1)
    line = torch.arange(-reach, reach + 1, dtype=torch.float32)
    y, x = torch.meshgrid(line, line, indexing="ij")
    parts = []
    for scale in range(scales):
        for number in range(orientations):
            angle = math.pi * number / orientations
            along, across = (
                x * math.cos(angle) + y * math.sin(angle),
                y * math.cos(angle) - x * math.sin(angle),
            )
            sigma = 0.8 * 2**scale
            envelope = torch.exp(-(along**2 + (across / 1.5) ** 2) / (2 * sigma**2))
            frequency = 0.75 * math.pi / 2**scale
            for wave in (torch.cos(frequency * along), torch.sin(frequency * along)):
                wavelet = envelope * wave
                wavelet = wavelet - envelope * wavelet.sum() / envelope.sum()
                parts.append(wavelet / wavelet.norm())
    return torch.stack(parts)
