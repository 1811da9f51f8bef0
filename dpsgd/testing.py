"""Check your own model: do all engines agree on it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dpsgd.checks import relative_gap, tolerance, without_dropout
from dpsgd.engines import Batch, Engine, Ghost, Hooks, Loop, LossFn, Opacus, Vmap
from dpsgd.engines.batch import check_losses, map_tensors, size_of
from dpsgd.engines.probe import RandomState

ENGINES: tuple[type[Engine], ...] = (Ghost, Hooks, Vmap, Opacus)


def assert_engines_agree(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    engines: Sequence[type[Engine]] = ENGINES,
    rtol: float | None = None,
) -> dict[str, str]:
    """Compares engines with `Loop` on a model: losses, norms, weighted sums, per-sample gradients.

    Dropout is off meanwhile. The losses of the ordinary batched forward pass are compared as well,
    so that a model that mixes its samples is found even if every engine keeps them apart.

    Args:
        model: The model; it is left as found.
        loss_fn: `loss_fn(model, batch) -> Tensor[B]`.
        batch: A batch of at least two samples.
        engines: Engine classes to hold against `Loop`.
        rtol: Largest difference allowed, relative to the largest entry; by default what rounding
            explains in the model's dtype (1e-9 in float64, 1e-3 in float32).

    Returns:
        "agrees", or the refusal of an engine that cannot run the model, by engine name.

    Raises:
        AssertionError: If results differ; it names engine, quantity and parameter.
        ValueError: If batch or loss make no sense, or no engine could run the model.
    """
    size = size_of(batch)
    if size < 2:
        raise ValueError(f"Expected a batch of at least 2 samples, got {size}.")
    with without_dropout(model), RandomState(model).replayed():
        expected = _results(Loop(model, loss_fn), batch)
        with torch.no_grad():
            losses = check_losses(loss_fn(model, map_tensors(Tensor.clone, batch)), size)
        _compare("the batched forward pass", {"losses": losses}, expected, rtol)
        verdicts = {}
        for engine in engines:
            try:
                actual = _results(engine(model, loss_fn), batch)
            except ValueError as refusal:
                verdicts[engine.__name__] = str(refusal)
                continue
            _compare(engine.__name__, actual, expected, rtol)
            verdicts[engine.__name__] = "agrees"
    if engines and "agrees" not in verdicts.values():
        raise ValueError(f"Expected some engine besides Loop to run the model, got {verdicts}.")
    return verdicts


def _results(engine: Engine, batch: Batch) -> dict[str, Tensor]:
    grads = engine(map_tensors(Tensor.clone, batch))
    norms = grads.norms()
    weights = torch.linspace(0.5, 1.5, len(norms), device=norms.device)
    sums = {f"weighted sum of '{n}'": s for n, s in grads.weighted_sum(weights).items()}
    dense = {f"gradients of '{n}'": g for n, g in grads.materialize().items()}
    return {"losses": grads.losses, "norms": norms, **sums, **dense}


def _compare(
    who: str, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float | None
) -> None:
    dense = [value for what, value in expected.items() if what.startswith("gradients of")]
    scale = max(float(value.abs().max()) for value in dense)
    for what, value in actual.items():
        allowed = tolerance(expected["losses"].dtype) if rtol is None else rtol
        gap = relative_gap(value, expected[what], 0.0 if what in ("losses", "norms") else scale)
        if gap > allowed:
            raise AssertionError(
                f"{who} and Loop disagree in the {what}: relative difference {gap:.1e}, expected "
                f"at most {allowed:.0e}. Either samples influence each other (dpsgd.checks."
                "check_independence tells), or it is a bug: please report the model."
            )
