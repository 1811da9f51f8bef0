"""Lightning's `Trainer` and a `LightningModule`, training by a privacy plan.

Needs `pip install 'dpsgd[lightning]'`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dpsgd.integrations.batches import steps_per_epoch
from dpsgd.integrations.private_run import PrivateRun
from dpsgd.plan import PrivacyPlan

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import (
        BatchSizeFinder,
        LearningRateFinder,
        StochasticWeightAveraging,
    )
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise ImportError(
        "Expected the lightning library, got an environment without it. "
        "Install it with: pip install 'dpsgd[lightning]'."
    ) from error

_PRECISIONS = "32-true", "64-true", "bf16-true"
_CALLBACKS = BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
_HOOKS = (
    "backward",
    "configure_gradient_clipping",
    "on_after_backward",
    "on_after_batch_transfer",
    "on_before_backward",
    "on_before_batch_transfer",
    "optimizer_step",
    "optimizer_zero_grad",
    "transfer_batch_to_device",
)


class PrivateTraining(Callback):
    """Makes `Trainer.fit` run a privacy plan, for a LightningModule as it is.

    While it fits, a step of the plan stands in place of the module's `training_step`; everything
    else of the module and the trainer works as usual. The metric `epsilon` is logged; nothing else
    of the training is.

    Give it to the trainer, and the trainer the batches of the run:

        Trainer(max_steps=plan.num_steps, callbacks=[PrivateTraining(run)]).fit(
            module, run.batches(records, physical_batch_size=64)
        )

    Args:
        run: The plan, the loss and a synthetic batch.
    """

    def __init__(self, run: PrivateRun) -> None:
        if not isinstance(run, PrivateRun):
            raise ValueError(f"Expected a PrivateRun, got {type(run).__name__}.")
        self.run = run
        self._replaced = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what would break or hide the guarantee, before there is a batch.

        Raises:
            ValueError: Saying what, and what to do.
        """
        if stage == "fit":
            self.run.check_new()
            _check_not_resumed(trainer)
            _check_length(trainer, self.run.plan)
            _check_computation(trainer)
            _check_module(pl_module)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]
    ) -> None:
        """Refuses to go on from a checkpoint; to test one is fine."""
        if trainer.state.fn == "fit":
            _check_not_resumed(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks model and optimizer on the synthetic batch, and takes over the training step."""
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                raise ValueError(
                    "Expected a learning rate that depends on the step or the epoch, got "
                    "ReduceLROnPlateau. Use another scheduler."
                )
        optimizer = pl_module.optimizers()  # its steps are counted by the trainer
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.run.begin(pl_module, optimizer)

        def private_step(batch: object, batch_idx: int) -> None:
            self.run.take(batch)
            _step_schedulers(trainer, "step", batch_idx)
            pl_module.log("epsilon", self.run.epsilon, on_step=True, on_epoch=False, batch_size=1)

        pl_module.automatic_optimization = False  # the schedulers have been set up by now
        pl_module.training_step = private_step  # type: ignore[method-assign]
        self._replaced = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses batches that are not the plan's."""
        if self.run.loader is None or trainer.train_dataloader is not self.run.loader:
            raise ValueError(
                "Expected the batches of the plan as training data, got a data loader of another "
                "kind, or changed by the trainer. Pass run.batches(records, "
                "physical_batch_size=...) to fit, as it is."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps the schedulers that count epochs."""
        _step_schedulers(trainer, "epoch", trainer.current_epoch)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the module its own training step back."""
        if self._replaced:
            del pl_module.training_step
            pl_module.automatic_optimization = True
            progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
            progress.optimizer.step.total.completed = self.run.steps_taken  # trainer.global_step
            self._replaced = False

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Gives the module its own training step back."""
        self.teardown(trainer, pl_module, "fit")


def _step_schedulers(trainer: Trainer, interval: str, index: int) -> None:
    """Steps the learning rates as the trainer does in automatic optimisation."""
    for config in trainer.lr_scheduler_configs:
        if config.interval == interval and (index + 1) % config.frequency == 0:
            trainer.lightning_module.lr_scheduler_step(config.scheduler, None)


def _check_not_resumed(trainer: Trainer) -> None:
    if trainer.ckpt_path is not None:
        raise ValueError(
            f"Expected a new run, got ckpt_path={trainer.ckpt_path}: its steps would be drawn and "
            "noised a second time. Load its weights with load_from_checkpoint, and train them by a "
            "new plan; the budgets of both add up."
        )


def _expect(right: bool, name: str, taken: object, given: object, advice: str) -> None:
    if not right:
        raise ValueError(f"Expected {name}={taken}, got {given}. {advice}")


def _check_length(trainer: Any, plan: PrivacyPlan) -> None:  # it does not declare all it has
    """Raises unless the trainer takes all steps of the plan, and knows how many they are."""
    advice = "The plan says how many steps there are."
    trial = f"{advice} It would spend some of them: try it on made-up records, with another run."
    _expect(not trainer.fast_dev_run, "fast_dev_run", False, trainer.fast_dev_run, trial)
    _expect(not trainer.overfit_batches, "overfit_batches", 0.0, trainer.overfit_batches, advice)
    limit, steps, most = trainer.limit_train_batches, trainer.max_steps, trainer.max_epochs
    _expect(type(limit) is float and limit == 1, "limit_train_batches", 1.0, limit, advice)
    told = "Set max_steps=plan.num_steps: schedules of the learning rate count on it."
    _expect(steps == plan.num_steps, "max_steps", plan.num_steps, steps, told)
    epochs = math.ceil(plan.num_steps / steps_per_epoch(plan))
    reached = most is None or most == -1 or most >= epochs
    _expect(reached, "max_epochs", -1, most, f"The plan takes {epochs} epochs; leave it out.")
    found = [type(c).__name__ for c in trainer.callbacks if isinstance(c, _CALLBACKS)]
    if found:
        raise ValueError(
            f"Expected callbacks that add no steps, got {', '.join(found)}. {advice} For an "
            "average of the weights take WeightAveraging."
        )


def _check_computation(trainer: Trainer) -> None:
    """Raises unless clipping, physical batches and processes are left to the run."""
    strategy, clip = trainer.strategy, trainer.gradient_clip_val
    one = isinstance(strategy, SingleDeviceStrategy) and trainer.world_size == 1
    given = f"{type(strategy).__name__} of {trainer.world_size} device(s)"
    advice = (
        "One device trains here: set devices=1 and strategy='auto'. Several train with "
        "parallel=ddp of `python -m dpsgd.train`."
    )
    _expect(one, "strategy", "one of a single device", given, advice)
    advice = "For mixed precision give the loss dpsgd.precision.Autocast(loss_fn)."
    precision = trainer.precision
    _expect(precision in _PRECISIONS, "precision", " or ".join(_PRECISIONS), precision, advice)
    advice = "It would clip the noised gradient; the plan's clipping bounds each record."
    _expect(not clip, "gradient_clip_val", None, clip, advice)
    parts = trainer.accumulate_grad_batches
    advice = "PrivateRun.batches(..., physical_batch_size=) splits a step."
    _expect(parts == 1, "accumulate_grad_batches", 1, parts, advice)


def _check_module(pl_module: LightningModule) -> None:
    """Raises if the module has code for the training that would not run."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            "Expected automatic_optimization=True, got a module that optimises by hand: its "
            "training_step is not called, and its schedulers would not be stepped. Leave it out."
        )
    unused = [name for name in _HOOKS if is_overridden(name, pl_module)]
    if unused:
        raise ValueError(
            f"Expected a module without {', '.join(unused)} of its own: they are not called, or "
            "get no batch that they know. Prepare batches in collate_fn or loss_fn."
        )
