"""All checks in a row, and what they tell about the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dpsgd.checks.agreement import check_agreement, check_coverage
from dpsgd.checks.containment import check_containment
from dpsgd.checks.independence import check_independence
from dpsgd.checks.state import check_runs, check_unchanged_state, restored
from dpsgd.engines import Batch, Engine
from dpsgd.engines.batch import size_of


@dataclass(frozen=True)
class Preflight:
    """What is known of a model and an engine that passed.

    Attributes:
        engine: The engine's name.
        routes: For each trainable parameter how the engine gets its gradients. With the ghost
            engine: the rule of a function ("linear"), "expanded" where a function has no rule and
            takes one weight per sample, "... (computed)" where the weight is computed from the
            parameter, "unused" where the losses do not reach it. "formed" with other engines.
    """

    engine: str
    routes: Mapping[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.routes))
        lines = [f"  {name:<{width}}  {route}" for name, route in self.routes.items()]
        return "\n".join([f"{self.engine}: routes of {len(self.routes)} parameters", *lines])


def preflight(engine: Engine, batch: Batch) -> Preflight:
    """Raises unless the engine treats a synthetic batch exactly and the samples keep apart.

    Args:
        engine: The engine, with its model in train mode: eval mode would hide batch normalisation.
        batch: A synthetic batch of at least two samples, of the shapes that training will see.

    Returns:
        How the engine gets the gradients of each parameter.

    Raises:
        ValueError: If samples influence each other's losses or gradients, a forward pass changes
            buffers or parameters, the engine's gradients differ from those of `Loop` or do not add
            up to autograd's, or NaN in one sample spoils others.
    """
    check_runs(engine.model, engine.loss_fn, batch)
    check_unchanged_state(engine.model, engine.loss_fn, batch)
    check_independence(engine.model, engine.loss_fn, batch)
    check_agreement(engine, batch)
    check_coverage(engine, batch)
    check_containment(engine, batch)
    with restored(engine.model):
        grads = engine(batch)
        sums = grads.weighted_sum(torch.ones(size_of(batch)))
        if not any(total.any() for total in sums.values()):
            raise ValueError(
                "Expected losses that depend on the parameters, but all gradients are zero: "
                "training would follow the noise alone. Is something detached?"
            )
        return Preflight(type(engine).__name__, grads.routes())
