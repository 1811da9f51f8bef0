"""Training some of a model's parameters: biases alone, the head alone, ..."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def train_only(model: nn.Module, patterns: str | Sequence[str]) -> None:
    """Freezes all parameters but those whose names match a pattern; frozen ones stay so.

    `*bias` is bias-only fine-tuning: Ben Zaken et al. (2022), arXiv:2106.10199; privately Bu et
    al. (2022), arXiv:2210.00036.

    Args:
        model: The model.
        patterns: Patterns of names as for files, `head.*` for example; one, or several.

    Raises:
        ValueError: If a pattern matches no name, or nothing is left to train.
    """
    several = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    wanted: list[Any] = list(patterns) if several else [patterns]
    names = [name for name, _ in model.named_parameters()]
    for pattern in wanted:
        if not isinstance(pattern, str) or not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"Expected patterns of parameter names in model.trainable, but {pattern!r} matches "
                f"none of {', '.join(names)}."
            )
    for name, p in model.named_parameters():
        if not any(fnmatchcase(name, pattern) for pattern in wanted):
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"Expected something to train, but model.trainable={wanted} leaves none.")
