"""Digits drawn from fonts: public records for pre-training, made on the spot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dpsgd.data.base import Dataset
from dpsgd.data.schema import Schema

if TYPE_CHECKING:
    from PIL.Image import Image

_FONTS = (
    "DejaVuSans", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic",
    "STIXGeneral", "STIXGeneralItalic", "cmr10", "cmss10", "cmti10", "cmtt10",
)  # fmt: skip
_CANVAS, _CELLS, _SIZE = 96, 8, 56
_FINE = 32  # rows and columns of a digit before it becomes cells


def glyphs(
    input_shape: Sequence[int] = (1, 8, 8),
    num_classes: int = 10,
    public_size: int = 4000,
    vocab_size: None = None,
    num_train: int = 4000,
    num_test: int = 500,
    mean: float = 0.0,
    std: float = 1.0,
    seed: int = 0,
) -> Dataset:
    """Returns images of printed digits in the format of `digits`: nobody's records.

    A digit of one of the fonts that come with matplotlib, of random weight, width, slant and angle,
    fills 8 x 8 cells from top to bottom; a cell is (coverage - mean) / std, coverage in [0, 1].

    Args:
        input_shape: Shape of one image; any shape of 64 values, such as [8, 8].
        num_classes: Number of classes, at least 10.
        public_size: Number of training records to be used where it must be public.
        vocab_size: None: cells are not token ids.
        num_train: Number of training records.
        num_test: Number of test records.
        mean: Constant subtracted from each coverage.
        std: Constant that each is then divided by, > 0.
        seed: Seed of the data.

    Raises:
        ValueError: If the declarations do not fit the data, or a number is out of range.
    """
    if not std > 0:
        raise ValueError(f"Expected std > 0, got {std}.")
    if num_train < 1 or num_test < 1:
        raise ValueError(f"Expected num_train and num_test >= 1, got {num_train} and {num_test}.")
    x, y = _drawn(num_train + num_test, seed)
    x, y = Schema(input_shape, num_classes, vocab_size).conform((x - mean) / std, y)
    return Dataset(
        train=(x[:num_train], y[:num_train]),
        test=(x[num_train:], y[num_train:]),
        input_shape=input_shape,
        num_classes=num_classes,
        public_size=public_size,
        vocab_size=vocab_size,
    )


def _drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(seed)
    labels = random.integers(10, size=count)
    cells = np.stack([_digit(int(label), random) for label in labels])
    return torch.from_numpy(cells).float(), torch.from_numpy(labels)


def _digit(label: int, random: np.random.Generator) -> np.ndarray:
    """One digit as coverages [8, 8]."""
    from PIL import Image

    font, weight = str(random.choice(_FONTS)), int(random.integers(0, 4))
    drawn = _outline(font, label, weight)
    slant, angle = random.uniform(-0.3, 0.3), random.uniform(-12, 12)
    middle = _CANVAS / 2
    drawn = drawn.transform(
        drawn.size,
        Image.Transform.AFFINE,
        (1, slant, -slant * middle, 0, 1, 0),
        Image.Resampling.BILINEAR,
    ).rotate(angle, Image.Resampling.BILINEAR)
    box = drawn.getbbox()
    assert box is not None
    drawn = drawn.crop(box)
    widest = 0.9 * _FINE
    width = min(widest, max(drawn.width / drawn.height * _FINE * random.uniform(0.8, 1.2), 8))
    drawn = drawn.resize((round(width), _FINE), Image.Resampling.BILINEAR)
    fine = Image.new("L", (_FINE, _FINE))
    fine.paste(drawn, (round((_FINE - drawn.width) * random.uniform(0.35, 0.65)), 0))
    inked = np.asarray(fine) > 127
    side = _FINE // _CELLS
    return inked.reshape(_CELLS, side, _CELLS, side).mean((1, 3))


@cache
def _outline(font: str, label: int, weight: int) -> Image:
    """A digit in the middle of a large black canvas, its strokes thickened by some pixels."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    face = ImageFont.truetype(os.fspath(folder / f"{font}.ttf"), _SIZE)
    place = (_CANVAS / 2, _CANVAS / 2)
    ImageDraw.Draw(canvas).text(
        place, str(label), fill=255, font=face, anchor="mm", stroke_width=weight
    )
    return canvas
