"""Text with a label each, for classifiers: columns of a table as token ids and labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from dpsgd.data.base import Dataset
from dpsgd.data.columns import numbers_of
from dpsgd.data.schema import Records, Schema
from dpsgd.data.source import Source, library
from dpsgd.data.text import BYTES, Tokenize, ids_of, padded, to_bytes, tokenizer_of


def labelled_text(
    path: str | Path,
    column: str,
    label_column: str,
    input_shape: Sequence[int],
    num_classes: int | None,
    vocab_size: int,
    public_size: int,
    padding: int,
    *,
    tokenizer: str | None = None,
    subset: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    test_path: str | Path | None = None,
) -> Dataset:
    """Returns two columns of a table as token ids [N, T] and labels [N].

    One row is one record is one sequence: longer ones are cut off after T tokens, shorter ones are
    padded on the right. A classifier of `dpsgd.models.huggingface` does not attend to padding.

    Args:
        path: A file (.parquet, .csv, .arrow, .json, .jsonl), a folder of such files or one made by
            `save_to_disk`, or a name on the hub.
        column: The column of the inputs: text, or lists of token ids without padding.
        label_column: The column of the labels: class numbers, or numbers for regression.
        input_shape: [T], the length of a sequence.
        num_classes: Number of classes; None for regression.
        vocab_size: Number of tokens: 257 for bytes, the size of the tokenizer otherwise.
        public_size: Number of training records to be used where it must be public.
        padding: The token id of padding: 256 for bytes, that of the tokenizer otherwise.
        tokenizer: A local directory with the tokenizer of a Hugging Face model, for text. None
            takes the bytes of text in UTF-8.
        subset: Name of the configuration on the hub, where there are several.
        train_split: Name of the split to train on; one file is one such split.
        test_split: Name of the split to test on; None without a test set.
        test_path: The test set beside a single training file, in the same format.

    Raises:
        ValueError: If a library is not installed, the data or the tokenizer cannot be read, there
            is no such split or column, the padding is not that of the tokenizer, or the records do
            not match the declarations.
    """
    schema = Schema(input_shape, num_classes, vocab_size)
    if len(input_shape) != 1:
        raise ValueError(f"Expected input_shape [T] for text, got {list(input_shape)}.")
    source = Source(
        str(path), subset, train_split, test_split, None if test_path is None else str(test_path)
    )
    tokenize = _tokenize(tokenizer, input_shape[0], vocab_size, padding)
    with TemporaryDirectory() as scratch:
        tables = source.load(library(), scratch)

        def read(split: str) -> Records:
            table = source.pick(tables, split)
            ids = ids_of(table, column, tokenize, tokenizer, vocab_size)
            x, _ = padded(ids, input_shape[0], padding)
            return schema.conform(x, numbers_of(table, label_column))

        train = read(train_split)
        test = read(source.test_name) if source.test_name else None
    return Dataset(train, test, input_shape, num_classes, public_size, vocab_size, padding=padding)


def _tokenize(path: str | None, length: int, vocab_size: int, padding: int) -> Tokenize:
    """What makes token ids of text, none of which is the padding."""
    if path is None:

        def of_bytes(texts: Sequence[str]) -> Iterable[Sequence[int]]:
            if padding < BYTES:
                raise ValueError(
                    f"Expected padding={BYTES}, which is no byte, for text as bytes, got "
                    f"{padding}. Or name a local directory: data.tokenizer=DIRECTORY."
                )
            return to_bytes(texts)

        return of_bytes
    tokenize, expected = tokenizer_of(path, length, vocab_size)
    if expected is not None and expected != padding:
        raise ValueError(
            f"Expected padding={expected}, that of the tokenizer in '{path}', got {padding}. Set "
            f"data.padding={expected}."
        )
    return tokenize
