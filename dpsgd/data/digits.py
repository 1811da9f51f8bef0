"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpsgd.data.base import Dataset
from dpsgd.data.schema import Schema

_LARGEST_PIXEL = 16  # by the documentation of the data set, not by looking
_NUM_TEST = 360


def digits(
    input_shape: Sequence[int] = (1, 8, 8),
    num_classes: int = 10,
    public_size: int = 1437,
    vocab_size: None = None,
    mean: float = 0.0,
    std: float = 1.0,
) -> Dataset:
    """Returns 1437 training and 360 test images of 8 x 8 pixels, ten classes.

    A pixel is (value / 16 - mean) / std.

    Bundled with scikit-learn (`load_digits`), so nothing is downloaded. The split is stratified and
    always the same.

    Args:
        input_shape: Shape of one image; any shape of 64 values, such as [8, 8].
        num_classes: Number of classes, at least 10.
        public_size: Number of training records to be used where it must be public.
        vocab_size: None: pixels are not token ids.
        mean: Public constant subtracted from each pixel in [0, 1].
        std: Public constant that each pixel is then divided by, > 0.

    Raises:
        ValueError: If the declarations do not fit the data.
    """
    if not std > 0:
        raise ValueError(f"Expected std > 0, got {std}.")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (pixels / _LARGEST_PIXEL - mean) / std,
        labels,
        test_size=_NUM_TEST,
        random_state=0,
        stratify=labels,
    )
    schema = Schema(input_shape, num_classes, vocab_size)
    return Dataset(
        train=schema.conform(torch.from_numpy(x_train), torch.from_numpy(y_train)),
        test=schema.conform(torch.from_numpy(x_test), torch.from_numpy(y_test)),
        input_shape=input_shape,
        num_classes=num_classes,
        public_size=public_size,
        vocab_size=vocab_size,
    )
