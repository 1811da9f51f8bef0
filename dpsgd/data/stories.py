"""Short made-up stories in two dialects: something to pre-train on, and something to keep private.

A record is what somebody did in a day, in one to three sentences of a small grammar: when, who and
where, what they did there, how they felt. The public and the private dialect share words and
grammar, and differ in who there is, where they go, what they do there, and how often: what
fine-tuning has to learn. The texts are made up, so everybody may have them, and since the grammar
is known, so is the least loss that any model can have (`entropy`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from dpsgd import rng
from dpsgd.data.base import Dataset
from dpsgd.data.grammar import Grammar
from dpsgd.data.schema import Records, Schema
from dpsgd.losses import IGNORED

PADDING, BEGIN, END = "<pad>", "<s>", "</s>"
DIALECTS = "public", "private"

_Choices: TypeAlias = dict[str, list[tuple[float, Sequence[str]]]]

_DRAWS = 32  # numbers set aside for the choices of one text

_NAMES = {
    ("public", "she"): "anna clara emma julia laura maria nina sofia",
    ("public", "he"): "adam david felix jonas leo martin paul tom",
    ("private", "she"): "agnes dorothea henrietta philippa rosalind sigrid ursula winifred",
    ("private", "he"): "ambrose barnaby cornelius gideon leopold magnus rupert thaddeus",
}
_PLACES = {  # public ones | private ones besides
    "market": "market bakery shop | bazaar pawnshop",
    "park": "park zoo farm | stable aviary",
    "school": "school library museum | archive chapel",
    "kitchen": "kitchen restaurant picnic | canteen tavern",
    "workshop": "workshop garage garden | forge boathouse",
    "doctor": "hospital dentist pharmacy | clinic sanatorium",
}
_DEEDS = {
    "market": "bought sold ordered | haggled-for stole",
    "park": "fed chased watched | groomed sketched",
    "school": "read wrote studied | copied translated",
    "kitchen": "cooked ate shared | burned smuggled",
    "workshop": "built repaired painted | welded dismantled",
    "doctor": "got took needed | refused hid",
}
_THINGS = {
    "market": "apple loaf cheese melon basket | carpet lantern watch",
    "park": "dog duck goat horse rabbit | falcon llama peacock",
    "school": "book letter poem map story | manuscript ledger hymn",
    "kitchen": "soup cake pizza salad pie | stew dumpling trout",
    "workshop": "table bike fence chair shelf | anchor sword canoe",
    "doctor": "pill bandage cream vitamin mask | sedative transfusion crutch",
}
_QUALITIES = {
    "market": "red fresh cheap sweet big | antique forbidden",
    "park": "small brown young lazy white | wounded exotic",
    "school": "long funny old short sad | latin coded",
    "kitchen": "hot tasty cold green simple | smoked bitter",
    "workshop": "wooden new broken blue heavy | rusty bronze",
    "doctor": "tiny clean strong yellow soft | experimental nightly",
}
_TIMES = "in the morning|at noon|in the evening|on monday|on friday|on sunday|at midnight|in winter"
_MOTIONS = "went walked drove ran cycled limped sneaked"
_COMPANY = "sister brother mother father friend neighbour lawyer butler"
_MOODS = "happy tired proud calm hungry bored anxious guilty lonely relieved"
_TOPICS = tuple(_PLACES)


def stories(
    dialect: str,
    input_shape: Sequence[int],
    num_classes: int,
    vocab_size: int,
    public_size: int,
    num_train: int,
    num_test: int = 0,
    seed: int = 0,
) -> Dataset:
    """Returns stories as token ids [N, T], with their labels [N, T], for `loss=causal_lm`.

    A story is one record: <s>, words, </s>, padding; labels are -100 at padding. The story at a
    position depends on dialect, seed and position alone, whatever the number of stories; test
    stories have positions of their own.

    Args:
        dialect: `public` or `private`.
        input_shape: [T], at least the longest story.
        num_classes: Number of tokens, since they are what is predicted.
        vocab_size: Number of tokens, at least those of `vocabulary`.
        public_size: Number of training records to be used where it must be public.
        num_train: Number of training records.
        num_test: Number of test records; 0 makes no test set.
        seed: Seed of the data.

    Raises:
        ValueError: If there is no such dialect, or a number is too small.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"Expected dialect to be one of {', '.join(DIALECTS)}, got {dialect}.")
    if num_train < 1 or num_test < 0:
        raise ValueError(
            f"Expected num_train >= 1 and num_test >= 0, got {num_train} and {num_test}."
        )
    least, words = grammar(dialect).longest + 1, len(vocabulary())
    Schema(input_shape)
    if len(input_shape) != 1 or input_shape[0] < least:
        raise ValueError(f"Expected input_shape [T] with T >= {least}, got {list(input_shape)}.")
    if min(vocab_size, num_classes) < words:
        raise ValueError(
            f"Expected vocab_size and num_classes of at least {words}, the words of the stories, "
            f"got {vocab_size} and {num_classes}."
        )
    return Dataset(
        train=_records(dialect, "train", seed, num_train, input_shape[0]),
        test=_records(dialect, "test", seed, num_test, input_shape[0]) if num_test else None,
        input_shape=input_shape,
        num_classes=num_classes,
        public_size=public_size,
        vocab_size=vocab_size,
    )


def entropy(dialect: str) -> float:
    """Returns the mean nats per predicted token of the dialect: no model of it can do better.

    The entropy of a story over the mean number of its tokens, </s> included: exp of it is the
    least perplexity, on a large test set.
    """
    text = grammar(dialect)
    return text.entropy / text.mean_length


@cache
def vocabulary() -> tuple[str, ...]:
    """Returns the tokens of both dialects, in the order of their ids."""
    words: set[str] = set()
    for dialect in DIALECTS:
        rules = grammar(dialect).rules
        words |= {part for every in rules.values() for _, parts in every for part in parts}
        words -= set(rules)
    return PADDING, BEGIN, END, *sorted(words - {END})


@cache
def grammar(dialect: str) -> Grammar:
    """Returns the grammar of a dialect; a text ends with </s>."""
    private = dialect == "private"
    rules: _Choices = {
        "TIME": _ranked([time.split() for time in _TIMES.split("|")], private),
        "MOTION": _ranked([[word] for word in _MOTIONS.split()], private),
        "COMPANION": _ranked([[word] for word in _COMPANY.split()], private),
        "MOOD": _ranked([[word] for word in _MOODS.split()], private),
    }
    topics = _ranked([[topic] for topic in _TOPICS], private)
    rules["STORY"] = [
        (weight, [f"STORY-{who}-{topic}"]) for weight, (topic,) in topics for who in ("she", "he")
    ]
    for topic in _TOPICS:
        for kind, lists in (
            ("PLACE", _PLACES), ("DEED", _DEEDS), ("THING", _THINGS), ("QUALITY", _QUALITIES)
        ):  # fmt: skip
            common, _, rare = lists[topic].partition("|")
            words = common.split() + (rare.split() if private else [])
            rules[f"{kind}-{topic}"] = _ranked([[word] for word in words], private)
    for who, own in (("she", "her"), ("he", "his")):
        rules[f"NAME-{who}"] = _ranked([[n] for n in _NAMES[dialect, who].split()], private)
        rules |= _sentences(who, own, private)
    return Grammar("STORY", rules)


def _sentences(who: str, own: str, private: bool) -> _Choices:
    alone, together = (1.0, 2.0) if private else (3.0, 1.0)
    rules: _Choices = {
        f"WITH-{who}": [(alone, []), (together, ["with", own, "COMPANION"])],
        f"FELT-{who}": [
            (2.0 if private else 1.0, [who, "felt", "MOOD", "."]),
            (1.0 if private else 2.0, []),
        ],
    }
    for topic in _TOPICS:
        object_ = [f"THING-{topic}"]
        rules[f"OBJECT-{topic}"] = [
            (1.0, object_), (3.0 if private else 1.0, [f"QUALITY-{topic}", *object_])
        ]  # fmt: skip
        rules[f"STORY-{who}-{topic}"] = [
            (
                1.0,
                ["TIME", f"NAME-{who}", "MOTION", "to", "the", f"PLACE-{topic}", f"WITH-{who}"]
                + [".", who, f"DEED-{topic}", "the", f"OBJECT-{topic}", ".", f"FELT-{who}", END],
            )
        ]
    return rules


def _ranked(
    expansions: Sequence[Sequence[str]], private: bool
) -> list[tuple[float, Sequence[str]]]:
    """The expansions with Zipf's weights, those of the private dialect from the last one on."""
    count = len(expansions)
    return [
        (1 / (count - index if private else index + 1), words)
        for index, words in enumerate(expansions)
    ]


def _records(dialect: str, split: str, seed: int, count: int, length: int) -> Records:
    text, ids = grammar(dialect), {word: number for number, word in enumerate(vocabulary())}
    key = hashlib.sha256(f"stories {dialect} {split} {seed}".encode()).digest()
    x = torch.full((count, length), ids[PADDING])
    for row, draws in zip(x, rng.uniforms(key, 0, count * _DRAWS).view(count, _DRAWS).tolist()):
        words, _ = text.derive(iter(draws))
        tokens = [ids[BEGIN], *(ids[word] for word in words)]
        row[: len(tokens)] = torch.tensor(tokens)
    return x, torch.where(x == ids[PADDING], IGNORED, x)


def decode(ids: Tensor) -> str:
    """Returns the words of token ids [T], without beginning, end and padding."""
    words = [vocabulary()[number] for number in ids.tolist()]
    return " ".join(word for word in words if word not in (PADDING, BEGIN, END))


def encode(words: str) -> Tensor:
    """Returns <s> and the ids of words that are separated by blanks, [1, T]: a prompt.

    Raises:
        ValueError: If a word is not in the vocabulary.
    """
    known = vocabulary()
    unknown = [word for word in words.split() if word not in known]
    if unknown:
        raise ValueError(f"Expected words of the stories, got {', '.join(unknown)}.")
    return torch.tensor([[known.index(word) for word in (BEGIN, *words.split())]])
