"""Stories of a known grammar: deterministic, in two dialects, of a known entropy."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from dpsgd.data import stories
from dpsgd.data.grammar import Grammar
from dpsgd.data.stories import decode, encode, entropy, grammar, vocabulary
from dpsgd.losses import IGNORED

SIZES = {"input_shape": [24], "num_classes": 230, "vocab_size": 230, "public_size": 10}
both = pytest.mark.parametrize("dialect", ["public", "private"])


def made(dialect="private", num_train=50, **changes):
    return stories(dialect, **{**SIZES, "num_train": num_train, **changes})


def texts(dialect, count):
    draws = random.Random(0)
    return [grammar(dialect).derive(iter(draws.random, 2)) for _ in range(count)]


@both
def test_the_declared_sizes_suffice(dialect):
    assert grammar(dialect).longest + 1 == 24
    assert len(vocabulary()) == 230


@both
def test_entropy_is_the_mean_surprise(dialect):
    found = texts(dialect, 4000)
    mean = sum(surprise for _, surprise in found) / sum(len(words) for words, _ in found)
    assert entropy(dialect) == pytest.approx(mean, rel=0.01)


@both
def test_no_two_derivations_give_the_same_words(dialect):
    """Otherwise a text would be less surprising than its choices, and the entropy too high."""
    known = {}
    for words, surprise in texts(dialect, 20_000):
        assert known.setdefault(" ".join(words), surprise) == pytest.approx(surprise, abs=1e-9)


def test_entropy_by_hand():
    rules = {"S": [(1, ["a", "T"]), (3, ["b"])], "T": [(1, ["c"]), (1, ["d", "e"])]}
    toy = Grammar("S", rules)
    assert toy.entropy == pytest.approx(
        0.25 * math.log(4) + 0.75 * math.log(4 / 3) + 0.25 * math.log(2)
    )
    assert toy.mean_length == pytest.approx(0.25 * 2.5 + 0.75)
    assert toy.longest == 3
    assert toy.derive(iter([0.1, 0.9])) == (["a", "d", "e"], pytest.approx(math.log(8)))


def test_a_story_depends_on_its_position_alone():
    few, many = made(num_train=3).train[0], made(num_train=50).train[0]
    assert torch.equal(few, many[:3])


def test_seed_dialect_and_split_make_other_stories():
    data = [made(), made(seed=1), made("public")]
    inputs = [d.train[0] for d in data] + [made(num_test=50).test[0]]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(inputs, 2))


def test_labels_are_the_ids_but_for_padding():
    x, y = made().train
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, torch.where(x == 0, IGNORED, x))
    assert (y == IGNORED).any()


def test_names_of_the_private_dialect_are_none_of_the_public_one():
    public = {word for words, _ in texts("public", 2000) for word in words}
    private = {word for words, _ in texts("private", 2000) for word in words}
    assert "ursula" in private - public
    assert "anna" in public - private
    assert {"to", "the", "felt"} <= public & private


def test_words_and_ids():
    prompt = encode("on friday ursula")
    assert prompt.shape == (1, 4)
    assert decode(prompt[0]) == "on friday ursula"
    with pytest.raises(ValueError, match="words of the stories, got bob"):
        encode("on friday bob")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dialect": "secret"}, "one of public, private, got secret"),
        ({"input_shape": [23]}, "T >= 24"),
        ({"input_shape": [4, 6]}, "T >= 24"),
        ({"vocab_size": 100}, "at least 230"),
        ({"num_classes": 100}, "at least 230"),
        ({"num_train": 0}, "num_train >= 1"),
    ],
)
def test_arguments_are_checked(changes, words):
    with pytest.raises(ValueError, match=words):
        made(**changes)
