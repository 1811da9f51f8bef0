"""Does a sample that is not finite leave the gradients of the others alone?"""

from __future__ import annotations

import torch
from torch import Tensor

from dpsgd.checks.comparison import relative_gap, rounding_of
from dpsgd.checks.dropout import without_dropout
from dpsgd.checks.state import restored
from dpsgd.engines import Batch, Engine
from dpsgd.engines.batch import map_tensors


def check_containment(engine: Engine, batch: Batch) -> None:
    """Raises if NaN in one sample moves the norms of others.

    A gradient that is not finite weighs nothing, but 0 * NaN is NaN: an engine that adds up over
    the batch before it tells the samples apart gives all of them NaN, so that one record silences
    all others and moves the sum by as much as all of them.

    An engine that raises for such a batch passes: it says what is wrong. Inputs without floating
    numbers, token ids for example, are always finite.

    Args:
        engine: The engine.
        batch: A batch of at least two samples.

    Raises:
        ValueError: If other samples are not what they are beside a finite one.
    """
    with restored(engine.model), without_dropout(engine.model):
        expected = engine(map_tensors(Tensor.clone, batch)).norms()[1:]
        again = engine(map_tensors(Tensor.clone, batch)).norms()[1:]
        try:
            found = engine(map_tensors(_poisoned, batch)).norms()[1:]
        except (ValueError, RuntimeError):
            return
        limit = rounding_of(engine.model, engine.loss_fn, batch)
    if relative_gap(again, expected) > 0 or not expected.isfinite().all():
        return  # the model draws random numbers of its own, or knows no finite gradient
    if not found.isfinite().all() or relative_gap(found, expected) > limit:
        raise ValueError(
            f"Expected {type(engine).__name__} to keep a sample with NaN apart, but the gradients "
            "of other samples change beside one: a single record could silence all others. Sum "
            "nothing over the batch before the samples are told apart, or use engine=loop."
        )


def _poisoned(tensor: Tensor) -> Tensor:
    """A copy with NaN in the first sample, where the numbers are floating."""
    tensor = tensor.clone()
    if tensor.is_floating_point():
        tensor[0] = torch.nan
    return tensor
