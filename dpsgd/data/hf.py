"""Data sets of the Hugging Face hub, and local files, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from dpsgd.data.base import Dataset
from dpsgd.data.columns import Columns, Numbers
from dpsgd.data.schema import Schema
from dpsgd.data.source import Source, library


def huggingface(
    path: str | Path,
    input_column: str | Sequence[str],
    label_column: str,
    input_shape: Sequence[int],
    num_classes: int | None,
    public_size: int,
    vocab_size: int | None = None,
    *,
    subset: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    test_path: str | Path | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
) -> Dataset:
    """Returns columns of a data set of the Hugging Face hub, or of local files, as records.

    Image columns become [C, H, W] in [0, 1], converted to the declared number of channels but never
    resized. Other columns are numbers or equally long lists of numbers, in any shape that fits
    `input_shape`. Local files leave no copy of the records behind in the library's cache.

    Args:
        path: A file (.parquet, .csv, .arrow, .json, .jsonl), a folder of such files or one made by
            `save_to_disk`, or a name on the hub.
        input_column: The column of the inputs, or the numeric columns to put side by side.
        label_column: The column of the targets: class numbers, or numbers for regression.
        input_shape: Shape of one input.
        num_classes: Number of classes; None for regression.
        public_size: Number of training records to be used where it must be public.
        vocab_size: Number of tokens; None for inputs that are not token ids.
        subset: Name of the configuration on the hub, where there are several.
        train_split: Name of the split to train on; one file is one such split.
        test_split: Name of the split to test on; None without a test set.
        test_path: The test set beside a single training file, in the same format.
        mean: Subtracted from the inputs: one number, or one per entry of the first dimension
            (channel of an image). A public constant, not the mean of these records.
        std: The inputs are divided by it after that; a public constant, as `mean`.

    Raises:
        ValueError: If the library is not installed, the data cannot be read, there is no such split
            or column, or the records do not match the declarations.
    """
    schema = Schema(input_shape, num_classes, vocab_size)
    columns = Columns(input_column, label_column, schema, mean, std)
    source = Source(
        str(path), subset, train_split, test_split, None if test_path is None else str(test_path)
    )
    with TemporaryDirectory() as scratch:
        tables = source.load(library(), scratch)
        train = columns.read(source.pick(tables, train_split))
        test_name = source.test_name
        test = columns.read(source.pick(tables, test_name)) if test_name else None
    return Dataset(train, test, input_shape, num_classes, public_size, vocab_size)
