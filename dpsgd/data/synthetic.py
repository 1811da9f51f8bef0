"""Made-up data of any size with something to learn in it, for tests, benchmarks and first steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dpsgd.data.base import Dataset
from dpsgd.data.schema import Schema


def synthetic(
    kind: str,
    input_shape: Sequence[int],
    num_classes: int,
    public_size: int,
    num_train: int,
    num_test: int = 0,
    vocab_size: int | None = None,
    signal: float = 1.0,
    seed: int = 0,
    num_users: int | None = None,
) -> Dataset:
    """Returns records whose labels can be predicted from their inputs, uniform over the classes.

    Each class has a prototype. The same seed gives the same data, whatever the global random state,
    which is left alone.

    Args:
        kind: `vectors`: a normal prototype plus standard normal noise. `images`: the same with
            prototypes that vary smoothly over height and width. `tokens`: ids drawn independently
            from a distribution over the vocabulary of the class's own.
        input_shape: Shape of one input: any for vectors, [C, H, W] or [H, W] for images, [T] for
            tokens.
        num_classes: Number of classes.
        public_size: Number of training records to be used where it must be public.
        num_train: Number of training records.
        num_test: Number of test records; 0 makes no test set.
        vocab_size: Number of tokens; for tokens only.
        signal: Standard deviation of the prototypes, in units of the noise for images and vectors,
            in nats of log probability for tokens. 0 leaves nothing to learn.
        seed: Seed of the data.
        num_users: Number of users that the training records belong to, each to one at random; None
            for records without users.

    Raises:
        ValueError: If an argument is out of range or does not go with the kind.
    """
    if kind not in _SOURCES:
        raise ValueError(f"Expected kind to be one of {', '.join(_SOURCES)}, got {kind}.")
    if num_classes is None:
        raise ValueError("Expected num_classes to be a positive integer, got None.")
    schema = Schema(input_shape, num_classes, vocab_size)
    if num_train < 1 or num_test < 0:
        raise ValueError(
            f"Expected num_train >= 1 and num_test >= 0, got {num_train} and {num_test}."
        )
    if num_users is not None and num_users < 1:
        raise ValueError(f"Expected num_users >= 1 or null, got {num_users}.")
    if signal < 0:
        raise ValueError(f"Expected signal >= 0, got {signal}.")
    generator = Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_train + num_test,), generator=generator)
    inputs = _SOURCES[kind](schema, labels, num_classes, signal, generator)
    users = None
    if num_users is not None:
        users = torch.randint(num_users, (num_train,), generator=generator)
    return Dataset(
        train=(inputs[:num_train], labels[:num_train]),
        test=(inputs[num_train:], labels[num_train:]) if num_test else None,
        input_shape=input_shape,
        num_classes=num_classes,
        public_size=public_size,
        vocab_size=vocab_size,
        users=users,
    )


def _vectors(
    schema: Schema, labels: Tensor, num_classes: int, signal: float, generator: Generator
) -> Tensor:
    prototypes = torch.randn(num_classes, *schema.input_shape, generator=generator)
    noise = torch.randn(len(labels), *schema.input_shape, generator=generator)
    return signal * prototypes[labels] + noise


def _images(
    schema: Schema, labels: Tensor, num_classes: int, signal: float, generator: Generator
) -> Tensor:
    if len(schema.input_shape) not in (2, 3):
        raise ValueError(
            f"Expected input_shape [C, H, W] or [H, W] of images, got {list(schema.input_shape)}."
        )
    *channels, height, width = schema.input_shape
    coarse = torch.randn(num_classes, math.prod(channels), 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    prototypes = smooth.reshape(num_classes, *schema.input_shape)
    noise = torch.randn(len(labels), *schema.input_shape, generator=generator)
    return signal * prototypes[labels] + noise


def _tokens(
    schema: Schema, labels: Tensor, num_classes: int, signal: float, generator: Generator
) -> Tensor:
    if schema.vocab_size is None or len(schema.input_shape) != 1:
        raise ValueError(
            f"Expected vocab_size and input_shape [T] of tokens, got vocab_size "
            f"{schema.vocab_size} and input_shape {list(schema.input_shape)}."
        )
    (length,) = schema.input_shape
    logits = signal * torch.randn(num_classes, schema.vocab_size, generator=generator)
    ids = torch.empty(len(labels), length, dtype=torch.int64)
    for label, probabilities in enumerate(logits.softmax(-1)):
        members = (labels == label).nonzero().squeeze(1)
        if len(members):
            count = len(members) * length
            drawn = torch.multinomial(probabilities, count, replacement=True, generator=generator)
            ids[members] = drawn.view(-1, length)
    return ids


Source: TypeAlias = Callable[[Schema, Tensor, int, float, Generator], Tensor]

_SOURCES: Mapping[str, Source] = {"vectors": _vectors, "images": _images, "tokens": _tokens}
