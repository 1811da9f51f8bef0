"""Losses: `loss(model, batch) -> Tensor[B]`, one number per sample, the unit of privacy.

A sample's loss is the mean over its own positions and over nothing else. An average over the batch
would make one sample's gradient depend on the others, and no clipping could bound its influence.

Every loss runs under `torch.func.vmap` with batches of one, and computes in float32 or better
whatever the dtype of the model. A model returns a tensor, or an output with its scores as `logits`,
as the models of Hugging Face do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Model: TypeAlias = Callable[..., Any]
"""Whatever callable the engine passes: the module itself, or a functional view of it."""

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Inputs and targets of the same B samples."""

IGNORED = -100
"""The label of a position that does not count, as in `torch.nn.functional.cross_entropy`."""

Tokens: TypeAlias = Tensor | Pair | Mapping[str, Tensor]
"""Sequences of token ids: alone, with their labels, or as a mapping."""


def cross_entropy(model: Model, batch: Pair) -> Tensor:
    """Returns the cross entropy in nats between class scores and labels, [B].

    Positions labelled -100 do not count; a sample without any other position has loss 0.

    Args:
        model: Maps x to unnormalised scores [B, classes, ...].
        batch: `(x, y)`, y being integer labels [B, ...], one per position of the scores.

    Raises:
        ValueError: If the labels are not integers or do not match the positions of the scores.
    """
    x, y = batch
    scores = _widened(scores_of(model(x)))
    if y.is_floating_point() or y.is_complex():
        raise ValueError(f"Expected integer labels, got {y.dtype}. Use mse for regression.")
    if scores.dim() < 2 or scores.shape[:1] + scores.shape[2:] != y.shape:
        raise ValueError(
            f"Expected scores [B, classes, ...] and labels [B, ...], got {list(scores.shape)} and "
            f"{list(y.shape)}. Move the classes to dimension 1."
        )
    losses = F.cross_entropy(scores, y.long(), reduction="none", ignore_index=IGNORED)
    return _mean_of_counted(losses, y != IGNORED)


def mse(model: Model, batch: Pair) -> Tensor:
    """Returns the mean squared error over the outputs of each sample, [B].

    Args:
        model: Maps x to predictions of the shape of y; a last dimension of one may be extra.
        batch: `(x, y)`, y being the targets [B, ...].

    Raises:
        ValueError: If predictions and targets differ in shape; they are never broadcast.
    """
    x, y = batch
    predictions = _matched(_widened(scores_of(model(x))), y)
    return _mean(F.mse_loss(predictions, y.to(predictions.dtype), reduction="none"))


def binary_cross_entropy(model: Model, batch: Pair) -> Tensor:
    """Returns the mean cross entropy in nats of each sample's yes/no questions, [B].

    Args:
        model: Maps x to logits of the shape of y; a last dimension of one may be extra.
        batch: `(x, y)`, y being the answers [B, ...], 0 and 1 or probabilities, of any dtype.

    Raises:
        ValueError: If logits and answers differ in shape; they are never broadcast.
    """
    x, y = batch
    logits = _matched(_widened(scores_of(model(x))), y)
    return _mean(F.binary_cross_entropy_with_logits(logits, y.to(logits.dtype), reduction="none"))


def causal_lm(model: Model, batch: Tokens) -> Tensor:
    """Returns the mean cross entropy in nats of each sample's next tokens, [B].

    The prediction at position t counts if t and t + 1 are attended and label t + 1 is not -100. A
    sample without any such position has loss 0.

    Args:
        model: Maps token ids [B, T] to logits [B, T, vocabulary], a tensor or the `logits` of the
            output. Called as `model(input_ids)`, with `attention_mask=` if the batch has one.
        batch: Token ids [B, T]; or a pair of ids and labels [B, T]; or a mapping with `input_ids`
            [B, T] and optionally `attention_mask` [B, T] (0 where not attended) and `labels`
            [B, T]. Labels are the ids unless given, and shifted here, as in Hugging Face models.

    Raises:
        ValueError: If there are fewer than two tokens, so that nothing is predicted, or the labels
            are not one per token.
    """
    nats, counted = next_token_nats(model, batch)
    return nats / counted.clamp(min=1)


def next_token_nats(model: Model, batch: Tokens) -> tuple[Tensor, Tensor]:
    """Returns the cross entropy in nats of each sample's next tokens, summed, and their number.

    Two tensors [B]; arguments and errors are those of `causal_lm`, which is their quotient.
    """
    fields = _token_fields(batch)
    ids = fields["input_ids"]
    labels = fields.get("labels", ids)
    if ids.dim() != 2 or ids.shape[1] < 2:
        raise ValueError(f"Expected token ids [B, T] with T >= 2, got {list(ids.shape)}.")
    if labels.shape != ids.shape or labels.is_floating_point():
        raise ValueError(
            f"Expected one integer label per token id, {list(ids.shape)}, got {labels.dtype} "
            f"{list(labels.shape)}. Use cross_entropy for one label per sequence."
        )
    labels = labels[:, 1:]
    if "attention_mask" in fields:
        mask = fields["attention_mask"]
        output = model(ids, attention_mask=mask)
        attended = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        labels = torch.where(attended, labels, IGNORED)
    else:
        output = model(ids)
    logits = _widened(scores_of(output))[:, :-1]
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten().long(), reduction="none", ignore_index=IGNORED
    )
    return losses.view_as(labels).sum(1), (labels != IGNORED).sum(1)


def scores_of(output: Any) -> Tensor:
    """Returns the scores in a model's output: the tensor that it is, or its `logits`.

    Raises:
        ValueError: If it is neither a tensor nor an output with `logits`.
    """
    if isinstance(output, Tensor):
        return output
    try:
        return output.logits
    except AttributeError as error:
        raise ValueError(
            f"Expected the model to return a tensor, or an output with logits, got "
            f"{type(output).__name__}. Return the scores, or write a loss of your own."
        ) from error


@dataclass(frozen=True)
class PerUser:
    """A loss per user: the mean over the user's records, so that the user is the unit of privacy.

    Attributes:
        loss_fn: The loss per record.
    """

    loss_fn: Callable[[Model, Any], Tensor]

    def __call__(self, model: Model, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Returns the mean loss of each user, [B].

        Args:
            model: Sees the records one after another, [B k, ...].
            batch: `(x, y, present)`: inputs [B, k, ...], targets [B, k, ...], and which of them are
                records, [B, k]. A user without any has loss 0.
        """
        x, y, present = batch
        losses = self.loss_fn(model, (x.flatten(0, 1), y.flatten(0, 1))).view(present.shape)
        counted = present.bool()
        total = torch.where(counted, losses, 0).sum(1)
        return total / counted.sum(1).clamp(min=1)


@dataclass(frozen=True)
class MeanOfViews:
    """A loss per sample of which there are several views: the mean over them, one gradient.

    De et al. (2022), arXiv:2204.13650: averaged before the clip, K views cost no more privacy than
    one. `dpsgd.augmentation` makes them.

    Attributes:
        loss_fn: The loss of one view.
    """

    loss_fn: Callable[[Model, Any], Tensor]

    def __call__(self, model: Model, batch: Pair) -> Tensor:
        """Returns the mean loss over the views of each sample, [B].

        Args:
            model: Sees the views one after another, [B K, ...].
            batch: `(x, y)`: views [B, K, ...] and the targets [B, ...] that they share.
        """
        x, y = batch
        targets = y.unsqueeze(1).expand(y.shape[0], x.shape[1], *y.shape[1:])
        losses = self.loss_fn(model, (x.flatten(0, 1), targets.flatten(0, 1)))
        return losses.view(x.shape[:2]).mean(1)


def per_record(loss_fn: Callable[[Model, Any], Tensor]) -> Callable[[Model, Any], Tensor]:
    """Returns the loss of one record as it is, out of a loss per user or of several views."""
    while isinstance(loss_fn, PerUser | MeanOfViews):
        loss_fn = loss_fn.loss_fn
    return loss_fn


def _token_fields(batch: Tokens) -> Mapping[str, Tensor]:
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    if isinstance(batch, Mapping):
        return batch
    ids, labels = batch
    return {"input_ids": ids, "labels": labels}


def _widened(output: Tensor) -> Tensor:
    """Returns the output in float32 if it is narrower."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _matched(output: Tensor, y: Tensor) -> Tensor:
    if output.shape == (*y.shape, 1):
        return output.squeeze(-1)
    if output.shape != y.shape:
        raise ValueError(
            f"Expected one output per target, got outputs {list(output.shape)} for targets "
            f"{list(y.shape)}. Set the model's number of outputs to the targets of one sample."
        )
    return output


def _mean(losses: Tensor) -> Tensor:
    """Means of [B, ...] over each sample's own positions, [B]."""
    return losses.unsqueeze(-1).flatten(1).mean(1)


def _mean_of_counted(losses: Tensor, counted: Tensor) -> Tensor:
    """Means of [B, ...], zero where not counted, over each sample's counted positions, [B]."""
    totals = losses.unsqueeze(-1).flatten(1).sum(1)
    return totals / counted.unsqueeze(-1).flatten(1).sum(1).clamp(min=1)
