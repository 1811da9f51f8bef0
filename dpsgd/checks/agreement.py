"""Does an engine give the right per-sample gradients? Held against `Loop` and against autograd."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpsgd.checks.comparison import relative_gap, rounding_of
from dpsgd.checks.dropout import without_dropout
from dpsgd.checks.state import restored
from dpsgd.engines import Batch, Engine, Loop
from dpsgd.engines.batch import check_losses, map_tensors, size_of
from dpsgd.engines.probe import plain_gradients

_BATCHED = 1e-4
"""What a batched pass may differ by from one for each sample, where parts of it are in float32."""


def check_agreement(engine: Engine, batch: Batch) -> None:
    """Raises if the engine's per-sample gradients differ from those of `Loop`, dropout being off.

    Gradients, their norms and a weighted sum are compared, for each parameter. A model that draws
    other random numbers cannot be compared and passes.

    Raises:
        ValueError: Naming the parameter with the largest difference.
    """
    if isinstance(engine, Loop):
        return
    loop = Loop(engine.model, engine.loss_fn)
    with restored(engine.model), without_dropout(engine.model):
        expected = _results(loop, batch)
        again = _results(loop, batch)
        actual = _results(engine, batch)
        limit = rounding_of(engine.model, engine.loss_fn, batch)
    if any(relative_gap(again[what], expected[what]) > 0 for what in expected):
        return
    scales = {kind: _largest(expected, kind) for kind, _ in expected}
    gaps = {what: relative_gap(actual[what], expected[what], scales[what[0]]) for what in expected}
    kind, worst = what = max(gaps, key=lambda what: gaps[what])
    if gaps[what] > limit:
        raise ValueError(
            f"Expected {type(engine).__name__} to agree with Loop, but the {kind} of '{worst}' "
            f"differ by {gaps[what]:.1e} of their size. Use engine=loop, and please report the "
            "model."
        )


def check_coverage(engine: Engine, batch: Batch) -> None:
    """Raises unless per-sample gradients add up to autograd's gradient, for each parameter.

    The reference is the ordinary batched forward pass, sample by sample: the gradient of each loss
    must be that sample's gradient. A use of a parameter that an engine misses shows here, and so do
    gradients that samples share although their losses do not move with each other (a batch mean
    minus its detached self). Dropout is off meanwhile.

    Raises:
        ValueError: Naming the parameter.
    """
    size = size_of(batch)
    with restored(engine.model), without_dropout(engine.model), torch.enable_grad():
        dense = engine(batch).materialize()
        losses = check_losses(engine.loss_fn(engine.model, map_tensors(Tensor.clone, batch)), size)
        rows = [plain_gradients(loss, engine.parameters, retain_graph=True) for loss in losses]
        again = engine.loss_fn(engine.model, map_tensors(Tensor.clone, batch))
        limit = max(rounding_of(engine.model, engine.loss_fn, batch), _BATCHED)
    if not torch.equal(losses, again):
        return  # the model draws random numbers of its own: nothing to compare
    scale = max(float(row[name].abs().max()) for row in rows for name in row if row[name].numel())
    for name in dense:
        expected = torch.stack([row[name] for row in rows])
        if relative_gap(dense[name].sum(0), expected.sum(0), scale) > limit:
            raise ValueError(
                f"Expected the per-sample gradients of {type(engine).__name__} to add up to "
                f"autograd's gradient, but they do not for '{name}': it is used where the engine "
                "does not see it, or samples influence each other. Use engine=loop, and check "
                "with dpsgd.checks.check_independence."
            )
        if relative_gap(dense[name], expected, scale) > limit:
            raise ValueError(
                f"Expected independent samples, but in the batched forward pass the gradients of "
                f"samples for '{name}' are not those that each sample has alone. Differential "
                "privacy needs losses that share nothing within a batch, not even by a detour "
                "that leaves their values alone."
            )


def _results(engine: Engine, batch: Batch) -> dict[tuple[str, str], Tensor]:
    grads = engine(map_tensors(Tensor.clone, batch))
    names = list(engine.parameters)
    norms = grads.norms([[name] for name in names])
    weights = torch.linspace(0.5, 1.5, len(norms), device=norms.device)
    results = {("per-sample gradients", n): g for n, g in grads.materialize().items()}
    results |= {("norms", name): norm for name, norm in zip(names, norms.unbind(1))}
    return results | {("weighted sums", n): s for n, s in grads.weighted_sum(weights).items()}


def _largest(results: Mapping[tuple[str, str], Tensor], kind: str) -> float:
    values = [v for (k, _), v in results.items() if k == kind and v.numel()]
    return max((float(value.abs().max()) for value in values), default=0.0)
