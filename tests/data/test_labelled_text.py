"""Text with labels; nothing here touches the network."""

from __future__ import annotations

import json

import pytest
import torch
from test_text import tokenizer  # noqa: F401, a fixture

from dpsgd.checks import synthetic_batch
from dpsgd.data import labelled_text

pytest.importorskip("datasets")
ROWS = [{"text": "to be", "label": 1}, {"text": "or", "label": 0}, {"text": "", "label": 1}]


@pytest.fixture
def rows(tmp_path):
    def write(rows, name="rows"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def read(path, vocab_size=257, padding=256, num_classes=2, **options):
    return labelled_text(path, "text", "label", [4], num_classes, vocab_size, 3, padding, **options)


def test_bytes_and_their_labels(rows):
    data = read(rows(ROWS))
    x, y = data.train
    assert x.tolist() == [list(b"to b"), [*b"or", 256, 256], [256] * 4]
    assert y.tolist() == [1, 0, 1]
    assert y.dtype == torch.int64
    assert data.padding == 256


def test_a_local_tokenizer(rows, tokenizer):  # noqa: F811
    x, _ = read(rows(ROWS), 5, 0, tokenizer=tokenizer).train
    assert x.tolist() == [[2, 3, 0, 0], [4, 0, 0, 0], [0] * 4]


def test_token_ids(rows):
    x, _ = read(rows([{"text": [3, 2], "label": 0}, {"text": [4] * 9, "label": 1}]), 5, 1).train
    assert x.tolist() == [[3, 2, 1, 1], [4] * 4]


def test_numbers_for_regression(rows):
    _, y = read(rows([{"text": "a", "label": 0.5}]), num_classes=None).train
    assert y.tolist() == [0.5]


def test_a_test_file(rows):
    data = read(rows(ROWS), test_path=rows(ROWS[:1], "test"))
    assert data.test[1].tolist() == [1]


def test_the_padding_must_be_the_tokenizers(rows, tokenizer):  # noqa: F811
    with pytest.raises(ValueError, match=r"Expected padding=0, .* got 1. Set data.padding=0"):
        read(rows(ROWS), 5, 1, tokenizer=tokenizer)


def test_the_padding_of_bytes_is_no_byte(rows):
    with pytest.raises(ValueError, match="Expected padding=256, which is no byte"):
        read(rows(ROWS), padding=0)


def test_the_padding_lies_in_the_vocabulary(rows):
    with pytest.raises(ValueError, match=r"Expected padding within 0..256, got 300"):
        read(rows(ROWS), padding=300)


def test_a_column_that_is_not_there(rows):
    with pytest.raises(ValueError, match="Expected a column 'label'"):
        read(rows([{"text": "a"}]))


def test_labels_outside_of_the_classes(rows):
    with pytest.raises(ValueError, match=r"training labels within 0\.\.1, got others"):
        read(rows([{"text": "a", "label": 2}]))


def test_text_is_a_sequence(rows):
    with pytest.raises(ValueError, match=r"Expected input_shape \[T\]"):
        labelled_text(rows(ROWS), "text", "label", [2, 2], 2, 257, 3, 256)


def test_synthetic_batches_end_in_the_declared_padding(rows):
    x, _ = synthetic_batch(read(rows(ROWS)), 4)
    assert (x == 256).any(1).sum() >= 3
