"""One run of a privacy plan in a loop that is not ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

from dpsgd.checks import preflight
from dpsgd.engines import Batch, Engine, Ghost, LossFn
from dpsgd.integrations.batches import Collate, LogicalBatch, loader_of
from dpsgd.noise import Gaussian
from dpsgd.placement import Placement
from dpsgd.plan import PrivacyPlan
from dpsgd.private_step import PrivateStep
from dpsgd.sampling import UserPoisson
from dpsgd.step_checks import check_no_batch_statistics, check_optimizer


class Waiting(torch.optim.Optimizer):
    """Leaves the private gradients where they are, for a loop that steps its optimizer itself.

    Args:
        optimizer: The optimizer of that loop, over whose parameters this one is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__([p for group in optimizer.param_groups for p in group["params"]], {})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Does nothing."""


class PrivateRun:
    """What is private about one run: its plan, its loss, its noise and its steps so far.

    The loops of other libraries get batches from it and give each back to it once. It serves one
    run: what it has released cannot be taken back, and its noise is used up.

    Args:
        plan: What is sampled, released and accounted for.
        loss_fn: `loss_fn(model, batch) -> [B]`, one loss per record.
        synthetic_batch: A made-up batch of at least two rows, shaped like those of training: the
            model is checked on it before a record is used.
        engine: Makes the engine of a model and a loss.
        noise: By default with a fresh key from the operating system.

    Attributes:
        step: The private step, once a model and an optimizer are known.
        loader: The data loader that `batches` made, None before.

    Raises:
        ValueError: If users are sampled: the data sets of other libraries do not say whose a record
            is.
    """

    def __init__(
        self,
        plan: PrivacyPlan,
        loss_fn: LossFn,
        *,
        synthetic_batch: Batch | None = None,
        engine: Callable[[nn.Module, LossFn], Engine] = Ghost,
        noise: Gaussian | None = None,
    ) -> None:
        if not isinstance(plan, PrivacyPlan):
            raise ValueError(f"Expected a PrivacyPlan, got {type(plan).__name__}.")
        if isinstance(plan.sampler, UserPoisson):
            raise ValueError(
                "Expected a sampler of records, got UserPoisson. Use Poisson here, or "
                "dpsgd.trainer.Trainer for user-level privacy."
            )
        self.plan = plan
        self.loss_fn = loss_fn
        self.synthetic_batch = synthetic_batch
        self.engine = engine
        self.noise = Gaussian() if noise is None else noise
        self.step: PrivateStep | None = None
        self.loader: DataLoader | None = None

    @property
    def steps_taken(self) -> int:
        """Number of releases so far."""
        return 0 if self.step is None else self.step.step

    @property
    def epsilon(self) -> float:
        """Upper bound on the epsilon spent so far, at the plan's delta. It is public."""
        return self.plan.spent(self.steps_taken)

    def batches(
        self,
        records: Any,
        *,
        physical_batch_size: int,
        collate_fn: Collate = default_collate,
        num_workers: int = 0,
    ) -> DataLoader:
        """Returns the data loader of the run: one item is what one step draws.

        Its length is that of an epoch, 1 / sample_rate; the next epoch goes on where it stopped,
        and it ends with the plan.

        Args:
            records: A data set with a length, that maps positions to records.
            physical_batch_size: Rows on the device at once; the result does not depend on it.
            collate_fn: Makes one batch, a pytree of tensors [B, ...], of a list of records.
            num_workers: Processes that fetch records.

        Raises:
            ValueError: If the records cannot be sampled, or the size makes no sense.
        """
        self.loader = loader_of(
            self.plan,
            records,
            physical_batch_size,
            collate_fn,
            num_workers,
            lambda: self.steps_taken,
        )
        return self.loader

    def check_new(self) -> None:
        """Raises unless nothing has been released: a run is neither repeated nor continued."""
        if self.steps_taken:
            raise ValueError(
                f"Expected a new run, but {self.steps_taken} of the {self.plan.num_steps} steps of "
                "its plan are spent. Make a new plan with a new sampler, and a new PrivateRun; the "
                "budgets of both add up."
            )

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> PrivateStep:
        """Checks the model on the synthetic batch; makes and returns the private step.

        Args:
            model: The model, in train mode and where it will be trained.
            optimizer: The optimizer, of all its trainable parameters.

        Raises:
            ValueError: If the run is not new, or model, loss and optimizer cannot be trained
                privately as they are.
        """
        self.check_new()
        if not model.training:
            raise ValueError("Expected the model in train mode, got eval mode: call model.train().")
        if self.synthetic_batch is None:
            raise ValueError(
                "Expected a synthetic_batch to check the model on, got none. Make up two rows or "
                "more, shaped like those of training, and pass them to PrivateRun."
            )
        check_no_batch_statistics(model)
        engine = self.engine(model, self.loss_fn)
        check_optimizer(optimizer, engine)
        self.plan.clipping.groups(list(engine.parameters))
        preflight(engine, Placement.of(model).batch(self.synthetic_batch))
        self.step = self.plan.private_step(engine, optimizer, self.noise)
        return self.step

    def take(self, drawn: object) -> None:
        """Takes one step with what it drew; nothing at all was drawn, too.

        Args:
            drawn: An item of the data loader, each once and in order.

        Raises:
            ValueError: If it is something else, or the model is in eval mode. Nothing has been
                released then.
        """
        step = self.step
        if not isinstance(drawn, LogicalBatch) or step is None or drawn.step != step.step:
            raise ValueError(
                f"Expected the batch that step {self.steps_taken} drew, got something else: each "
                "batch of PrivateRun.batches is taken once and in order."
            )
        if not step.engine.model.training:
            raise ValueError("Expected the model in train mode, got eval mode: call model.train().")
        place = Placement.of(step.engine.model)
        try:
            for batch, mask in drawn.parts:
                step.accumulate(place.batch(batch), mask.to(place.device))
            step.release()
        finally:
            step.discard()
