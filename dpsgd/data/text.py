"""Text for language models: a column of token ids, or of text with a tokenizer or as bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dpsgd.data.base import Dataset
from dpsgd.data.columns import Table
from dpsgd.data.schema import Records, Schema
from dpsgd.data.source import Source, library
from dpsgd.losses import IGNORED

BYTES = 256
"""The number of different bytes, and the id of what pads them."""

Tokenize = Callable[[Sequence[str]], Iterable[Sequence[int]]]


def text(
    path: str | Path,
    column: str,
    input_shape: Sequence[int],
    num_classes: int,
    vocab_size: int,
    public_size: int,
    tokenizer: str | None = None,
    *,
    subset: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    test_path: str | Path | None = None,
) -> Dataset:
    """Returns a column of a table as sequences for `loss=causal_lm`: ids and labels, both [N, T].

    One row is one record is one sequence: longer ones are cut off after T tokens, shorter ones are
    padded on the right, with label -100 at padding. Several rows are never packed into one
    sequence: its gradient would be theirs together, clipping would bound the sequence and not the
    row, and the guarantee would be for a sequence that no one person owns. Nor is one row spread
    over several sequences, which would let it join a step more than once.

    Causal attention sees no padding to its right, so none needs a mask.

    Args:
        path: A file (.txt with one record per line, .parquet, .csv, .arrow, .json, .jsonl), a
            folder of such files or one made by `save_to_disk`, or a name on the hub.
        column: The column: text, or lists of token ids without padding.
        input_shape: [T], the length of a sequence.
        num_classes: Number of tokens, since they are what is predicted.
        vocab_size: Number of tokens: 257 for bytes, the size of the tokenizer otherwise.
        public_size: Number of training records to be used where it must be public.
        tokenizer: A local directory with the tokenizer of a Hugging Face model, for text. None
            takes the bytes of text in UTF-8, the padding being id 256.
        subset: Name of the configuration on the hub, where there are several.
        train_split: Name of the split to train on; one file is one such split.
        test_split: Name of the split to test on; None without a test set.
        test_path: The test set beside a single training file, in the same format.

    Raises:
        ValueError: If a library is not installed, the data or the tokenizer cannot be read, there
            is no such split or column, or the records do not match the declarations.
    """
    Schema(input_shape)
    if len(input_shape) != 1 or input_shape[0] < 2:
        raise ValueError(f"Expected input_shape [T] with T >= 2, got {list(input_shape)}.")
    source = Source(
        str(path), subset, train_split, test_split, None if test_path is None else str(test_path)
    )
    tokenize: Tokenize = to_bytes
    padding = BYTES
    if tokenizer is not None:
        tokenize, its_padding = tokenizer_of(tokenizer, input_shape[0], vocab_size)
        padding = 0 if its_padding is None else its_padding
    padding = min(padding, vocab_size - 1)
    with TemporaryDirectory() as scratch:
        tables = source.load(library(), scratch)

        def read(split: str) -> Records:
            ids = ids_of(source.pick(tables, split), column, tokenize, tokenizer, vocab_size)
            return padded(ids, input_shape[0], padding)

        train = read(train_split)
        test = read(source.test_name) if source.test_name else None
    return Dataset(train, test, input_shape, num_classes, public_size, vocab_size, padding=padding)


def padded(sequences: Sequence[Sequence[int]], length: int, padding: int) -> Records:
    """Returns sequences cut and padded to one length, and their labels, both [N, T].

    Args:
        sequences: Token ids.
        length: T.
        padding: The id of what fills a sequence up; its label is -100.
    """
    x = torch.full((len(sequences), length), padding)
    y = torch.full((len(sequences), length), IGNORED)
    for row, ids in enumerate(sequences):
        kept = torch.tensor(list(ids[:length]), dtype=torch.int64)
        x[row, : len(kept)] = y[row, : len(kept)] = kept
    return x, y


def ids_of(
    table: Table, column: str, tokenize: Tokenize, tokenizer: str | None, vocab_size: int
) -> list[Sequence[int]]:
    """Returns the token ids of each row.

    Args:
        table: The rows.
        column: The column with text or token ids.
        tokenize: Makes ids of text.
        tokenizer: Where `tokenize` came from; None if it takes bytes.
        vocab_size: Number of tokens.

    Raises:
        ValueError: If there is no such column, or it holds something else.
    """
    if column not in table.column_names:
        raise ValueError(
            f"Expected a column '{column}', got {', '.join(table.column_names)}. Set data.column "
            "to the one with the text or the token ids."
        )
    rows: list[Any] = list(table[column])
    if all(isinstance(row, str) for row in rows):
        if tokenizer is None and vocab_size <= BYTES:
            raise ValueError(
                f"Expected vocab_size={BYTES + 1} for text as bytes and their padding, got "
                f"{vocab_size}. Or name a local directory: data.tokenizer=DIRECTORY."
            )
        return list(tokenize(rows))
    if not all(_is_ids(row) for row in rows):
        raise ValueError(
            f"Expected text, or lists of token ids, in every row of column '{column}', got "
            f"{table.features[column]} or missing values."
        )
    if tokenizer is not None:
        raise ValueError(
            f"Expected text in column '{column}' for data.tokenizer, got token ids. Set "
            "data.tokenizer to null."
        )
    return rows


def _is_ids(row: Any) -> bool:
    return isinstance(row, list) and all(type(number) is int for number in row)


def to_bytes(texts: Sequence[str]) -> list[Sequence[int]]:
    """Returns the bytes of texts in UTF-8."""
    return [text.encode() for text in texts]


def tokenizer_of(path: str, length: int, vocab_size: int) -> tuple[Tokenize, int | None]:
    """Returns what tokenises text, and the id of its padding, None if it has none.

    Args:
        path: A local directory with the tokenizer of a Hugging Face model.
        length: The most tokens of a text.
        vocab_size: The declared number of tokens.

    Raises:
        ValueError: If it cannot be read, or has more tokens than declared.
    """
    from dpsgd.optional import transformers

    if not Path(path).expanduser().is_dir():
        raise ValueError(
            f"Expected a local directory with a tokenizer at data.tokenizer='{path}', got none. "
            "Nothing is downloaded: fetch it first, or leave it out to take bytes."
        )
    library = transformers()
    try:
        made = library.AutoTokenizer.from_pretrained(Path(path).expanduser(), local_files_only=True)
    except Exception as error:  # whatever the library says of files that it cannot read
        raise ValueError(
            f"Expected a tokenizer in '{path}', got: {' '.join(str(error).split())}"
        ) from error
    if len(made) > vocab_size:
        raise ValueError(
            f"Expected vocab_size of at least {len(made)}, the size of the tokenizer in '{path}', "
            f"got {vocab_size}."
        )

    def tokenize(texts: Sequence[str]) -> list[Sequence[int]]:
        return list(made(list(texts), truncation=True, max_length=length)["input_ids"])

    return tokenize, made.pad_token_id
