"""The training loop: sample, accumulate, privatise, step; a report after each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dpsgd.data import Dataset
from dpsgd.engines import Batch
from dpsgd.engines.batch import map_tensors
from dpsgd.evaluate import evaluate
from dpsgd.placement import Placement
from dpsgd.plan import PrivacyPlan
from dpsgd.private_step import Contribution, PrivateStep
from dpsgd.sampling import Poisson


@dataclass(frozen=True)
class StepReport:
    """What is known after a step.

    Attributes:
        step: Steps taken so far.
        epsilon: Upper bound on the epsilon spent so far.
        learning_rate: The optimizer's, of its first parameter group.
        test: Test loss and accuracy, if this step was evaluated.
        private: Training loss, gradient norm, clipped fraction and drawn batch size: not covered by
            the guarantee, never to be published.
    """

    step: int
    epsilon: float
    learning_rate: float
    test: Mapping[str, float]
    private: Mapping[str, float]


class Trainer:
    """Runs a privacy plan: num_steps releases over Poisson samples of the data.

    A logical batch is split into physical batches of a fixed size; the last one is padded and
    masked, so the result does not depend on the physical batch size.

    Args:
        step: The private step, its model in train mode.
        sampler: Draws the records of each step.
        data: Training records, and test records to evaluate on.
        plan: What is accounted for. Sampler and step must be what it says.
        physical_batch_size: Rows in memory at once.
        evaluate_every: Steps between evaluations on the test records; the last step always is.

    Raises:
        ValueError: If the plan contradicts sampler or step, the model is in eval mode, or a size is
            not positive.
    """

    def __init__(
        self,
        step: PrivateStep,
        sampler: Poisson,
        data: Dataset,
        plan: PrivacyPlan,
        *,
        physical_batch_size: int,
        evaluate_every: int = 10,
    ) -> None:
        if physical_batch_size < 1:
            raise ValueError(f"Expected physical_batch_size >= 1, got {physical_batch_size}.")
        if not isinstance(sampler, Poisson):
            raise ValueError(
                f"Expected a Poisson sampler, which is what the plan accounts for, got "
                f"{type(sampler).__name__}."
            )
        if evaluate_every < 1:
            raise ValueError(f"Expected evaluate_every >= 1, got {evaluate_every}.")
        if not step.engine.model.training:
            raise ValueError("Expected the model in train mode, got eval mode: call model.train().")
        _check_plan(plan, step, sampler)
        self.step = step
        self.sampler = sampler
        self.data = data
        self.plan = plan
        self.physical_batch_size = physical_batch_size
        self.evaluate_every = evaluate_every

    def run(self) -> Iterator[StepReport]:
        """Yields a report after each step; ends at the plan's last step, its budget.

        Leaving the loop early, by an exception or Ctrl-C, discards the unfinished step.
        """
        try:
            while self.step.step < self.plan.num_steps:  # whoever else releases is counted too
                private = self._take(self.step.step)
                yield self._report(self.step.step, private)
        finally:
            self.step.discard()

    def _take(self, number: int) -> Mapping[str, float]:
        drawn = self.sampler.sample(number, len(self.data))
        assert not len(drawn) or bool((drawn.diff() > 0).all()), "a record was drawn twice"
        place = Placement.of(self.step.engine.model)
        contributions = [
            self.step.accumulate(place.batch(batch), mask.to(place.device))
            for batch, mask in self._physical_batches(drawn)
        ]
        self.step.release()
        return _diagnostics(contributions, len(drawn))

    def _physical_batches(self, drawn: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        public_size = self.plan.expected_batch_size / self.plan.sample_rate
        size = min(self.physical_batch_size, math.ceil(public_size))
        for part in drawn.split(size) if len(drawn) else ():
            batch = self.data.take(part)
            missing = size - len(part)
            mask = torch.arange(size) < len(part)
            yield map_tensors(partial(_pad, rows=missing), batch), mask

    def _report(self, step: int, private: Mapping[str, float]) -> StepReport:
        due = step % self.evaluate_every == 0 or step == self.plan.num_steps
        engine = self.step.engine
        return StepReport(
            step=step,
            epsilon=self.plan.epsilon(step),
            learning_rate=self.step.optimizer.param_groups[0]["lr"],
            test=evaluate(engine.model, engine.loss_fn, self.data) if due else {},
            private=private,
        )


def _pad(tensor: Tensor, rows: int) -> Tensor:
    """Appends rows of zeros, which the mask silences."""
    return torch.cat([tensor, tensor.new_zeros((rows, *tensor.shape[1:]))]) if rows else tensor


def _check_plan(plan: PrivacyPlan, step: PrivateStep, sampler: Poisson) -> None:
    for name, planned, actual in (
        ("sample_rate", plan.sample_rate, sampler.sample_rate),
        ("noise_multiplier", plan.noise_multiplier, step.noise_multiplier),
        ("expected_batch_size", plan.expected_batch_size, step.expected_batch_size),
    ):
        if planned != actual:
            raise ValueError(f"Expected {name}={planned} as in the privacy plan, got {actual}.")


def _diagnostics(contributions: list[Contribution], drawn: int) -> Mapping[str, float]:
    if not contributions:
        return {"drawn_batch_size": 0.0}
    weights = torch.cat([c.weights.max(1).values for c in contributions])
    counted = weights > 0
    losses = torch.cat([c.losses for c in contributions])[counted]
    norms = torch.cat([c.norms.square().sum(1).sqrt() for c in contributions])[counted]
    return {
        "drawn_batch_size": float(drawn),
        "train_loss": float(losses.double().mean()),
        "grad_norm": float(norms.double().mean()),
        "clipped_fraction": float((weights[counted] < 1).double().mean()),
        "not_finite": float(drawn - int(counted.sum())),
    }
