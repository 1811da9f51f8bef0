"""Text and token ids as sequences of one length; nothing here touches the network."""

from __future__ import annotations

import json

import pytest
import torch

from dpsgd.data import text
from dpsgd.losses import IGNORED

pytest.importorskip("datasets")
LINES = ["To be", "or", "", "not to be, né?"]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path):
    def write(values, column="text"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
        return path

    return write


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "to", "be", "or"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def read(path, column="text", length=6, vocab_size=257, **options):
    return text(path, column, [length], vocab_size, vocab_size, 4, **options)


def test_bytes_are_cut_and_padded(lines):
    x, y = read(lines).train
    assert x.shape == y.shape == (4, 6)
    assert bytes(x[0, :5].tolist()).decode() == "To be"
    assert x[0, 5] == 256
    assert y[0].tolist() == [*x[0, :5].tolist(), IGNORED]
    assert bytes(x[3].tolist()).decode() == "not to"


def test_an_empty_line_is_a_record_without_a_label(lines):
    assert (read(lines).train[1][2] == IGNORED).all()


def test_characters_outside_ascii_are_several_bytes(lines):
    assert (read(lines, length=20).train[1] != IGNORED).sum(1).tolist() == [5, 2, 0, 15]


def test_token_ids(rows):
    x, y = read(rows([[1, 2, 3], [4], [5] * 9], "ids"), "ids", 4, 7).train
    assert y.tolist() == [[1, 2, 3, IGNORED], [4] + [IGNORED] * 3, [5] * 4]
    assert torch.equal(x[y != IGNORED], y[y != IGNORED])
    assert ((x >= 0) & (x < 7)).all()


def test_a_local_tokenizer(rows, tokenizer):
    path = rows(["to be or", "or what"])
    x, y = read(path, length=4, vocab_size=5, tokenizer=tokenizer).train
    assert x.tolist() == [[2, 3, 4, 0], [4, 1, 0, 0]]
    assert y.tolist() == [[2, 3, 4, IGNORED], [4, 1, IGNORED, IGNORED]]


def test_a_test_file(lines, tmp_path):
    (tmp_path / "test.txt").write_text("abc\n")
    assert read(lines, test_path=tmp_path / "test.txt").test[0].shape == (1, 6)


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        (["a"], {"column": "words"}, "column 'words', got text. Set data.column"),
        (["a"], {"vocab_size": 256}, "vocab_size=257 for text as bytes"),
        (["a"], {"length": 1}, "T >= 2"),
        (["a"], {"tokenizer": "no/such/folder"}, "Nothing is downloaded"),
        ([[1, 9]], {"vocab_size": 9}, r"within 0\.\.8"),
        ([[1, -100]], {}, "token ids within"),
        ([1.5], {}, "lists of token ids, in every row"),
        (["a", None], {}, "or missing values"),
    ],
)
def test_mistakes_are_explained(values, options, words, rows):
    with pytest.raises(ValueError, match=words):
        read(rows(values), **options)


def test_a_vocabulary_smaller_than_the_tokenizer(rows, tokenizer):
    with pytest.raises(ValueError, match="vocab_size of at least 5"):
        read(rows(["to"]), vocab_size=4, tokenizer=tokenizer)


def test_token_ids_need_no_tokenizer(rows, tokenizer):
    with pytest.raises(ValueError, match=r"Set data\.tokenizer to null"):
        read(rows([[1, 2]]), tokenizer=tokenizer)


def test_a_folder_without_a_tokenizer(rows, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Expected a tokenizer in"):
        read(rows(["a"]), tokenizer=str(tmp_path / "empty"))
