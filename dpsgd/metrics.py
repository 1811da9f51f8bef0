"""Which test result stands for a run: accuracy, perplexity, or the loss; in words, and in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from dpsgd.engines import Batch, LossFn
from dpsgd.losses import IGNORED, MeanOfViews, PerUser, causal_lm, next_token_nats, scores_of
from dpsgd.precision import Autocast
from dpsgd.recomputation import Recomputed

PREFERRED = ("test_accuracy", "test_perplexity", "test_loss")
"""The results that `evaluate` knows, the most telling one first."""

Tally = Callable[[nn.Module, Batch], tuple[Tensor, Tensor, Tensor]]
"""Losses of samples [B], and of what is counted besides: sum and number, scalars."""


def headline(test: Mapping[str, float]) -> str | None:
    """Returns the name of the most telling test result, None if there is no known one."""
    return next((name for name in PREFERRED if name in test), None)


def goodness(test: Mapping[str, float]) -> float | None:
    """Returns a number that is the higher the better the test result is; None without any."""
    name = headline(test)
    if name is None:
        return None
    return test[name] if name == "test_accuracy" else -test[name]


def shown(name: str, value: float) -> str:
    """Returns a test result as people read it: 92.2%, 17.31, 0.2622."""
    if name.endswith("accuracy"):
        return f"{value:.1%}"
    return f"{value:.2f}" if name.endswith("perplexity") else f"{value:.4f}"


def is_language_model(loss_fn: LossFn) -> bool:
    """Whether a loss is `causal_lm`, bare or as a configuration makes it."""
    while isinstance(loss_fn, Autocast | Recomputed | PerUser | MeanOfViews | partial):
        loss_fn = loss_fn.func if isinstance(loss_fn, partial) else loss_fn.loss_fn
    return loss_fn is causal_lm


def next_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the losses of sequences [B], their nats in all, and their counted tokens in all."""
    nats, counted = next_token_nats(model, batch)
    return nats / counted.clamp(min=1), nats.double().sum(), counted.sum()


def hits(loss_fn: LossFn) -> Tally:
    """Returns what counts the labels that a classifier gets right, at positions that count."""

    def tally(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        counted = y != IGNORED
        right = (scores_of(model(x)).argmax(1) == y) & counted
        return loss_fn(model, batch), right.sum(), counted.sum()

    return tally


def losses_alone(loss_fn: LossFn) -> Tally:
    """Returns what counts nothing but losses."""

    def tally(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        losses = loss_fn(model, batch)
        return losses, torch.zeros(()), torch.zeros(())

    return tally
