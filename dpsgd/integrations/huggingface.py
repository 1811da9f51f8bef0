"""The `Trainer` of Hugging Face's transformers, training by a privacy plan.

Needs `pip install 'dpsgd[hf]'`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpsgd.engines import Batch
from dpsgd.integrations.private_run import PrivateRun, Waiting
from dpsgd.losses import causal_lm
from dpsgd.step_checks import check_optimizer

try:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import TrainOutput
except ImportError as error:
    raise ImportError(
        "Expected the transformers and accelerate libraries, got an environment without them. "
        "Install them with: pip install 'dpsgd[hf]'."
    ) from error

_PRIVATE = "loss", "grad_norm", "train_loss", "total_flos", "num_input_tokens_seen"
_AUTOCAST = "Give the loss dpsgd.precision.Autocast(loss_fn), or load the model in bfloat16."
_PARALLEL = "One process trains here; several do with parallel=ddp of `python -m dpsgd.train`."
_BATCHES = "The plan's sampler draws the batches."

_REFUSED: Mapping[str, tuple[Any, str]] = {
    "max_grad_norm": (0, "It would clip the noised gradient; the plan's clipping bounds records."),
    "gradient_accumulation_steps": (
        1,
        "A step may be of any size: per_device_train_batch_size is what is in memory at once.",
    ),
    "fp16": (False, _AUTOCAST),
    "bf16": (False, _AUTOCAST),
    "torch_compile": (False, "The engine runs the model in a way of its own."),
    "use_liger_kernel": (False, "Its kernels mix the records of a batch."),
    "neftune_noise_alpha": (None, "Its noise protects nothing; add it in loss_fn if you want it."),
    "label_smoothing_factor": (0, "The loss is loss_fn: smooth in it."),
    "auto_find_batch_size": (False, "It would repeat steps. Set per_device_train_batch_size."),
    "train_sampling_strategy": ("random", _BATCHES),
    "group_by_length": (False, _BATCHES),
    "dataloader_drop_last": (False, _BATCHES),
    "include_num_input_tokens_seen": ("no", "The drawn tokens are private."),
    "skip_memory_metrics": (True, "Peaks of memory tell how many records were drawn."),
    "debug": ([], "It prints activations of private records."),
    "deepspeed": (None, _PARALLEL),
    "fsdp": (None, _PARALLEL),
    "parallelism_config": (None, _PARALLEL),
    "resume_from_checkpoint": (None, "See `train`."),
}
"""Settings of `TrainingArguments`: the value that is taken, and why no other one is."""


class PrivateTrainer(Trainer):
    """Trains a model of transformers by a privacy plan, with everything else as usual.

    The plan draws the batches, `per_device_train_batch_size` rows of which are on the device at
    once; each record's gradient is clipped, and the sums are noised. Then the optimizer and the
    learning rate scheduler of the trainer take their step. What the trainer logs is public: epsilon
    instead of the training loss and gradient norms.

    Args:
        model: The model.
        args: Its settings, with `max_steps=plan.num_steps` and `max_grad_norm=0`.
        run: The plan and the loss. Without a synthetic batch, one of token ids is made up.
        train_dataset: Records, as many as they are.
        eval_dataset: Records that are held to be public.
        data_collator: Makes one batch of a list of records, one row per record.
        processing_class: What is saved beside the model, a tokenizer.
        compute_metrics: Metrics of the evaluation.
        optimizers: Optimizer and scheduler, by default what `args` says.

    Raises:
        ValueError: If a setting would break or hide the guarantee; it says what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        run: PrivateRun,
        train_dataset: Any,
        *,
        eval_dataset: Any = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        processing_class: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(run, PrivateRun):
            raise ValueError(f"Expected a PrivateRun, got {type(run).__name__}.")
        _check_arguments(args, run.plan.num_steps)
        if run.synthetic_batch is None and run.loss_fn is causal_lm:
            run.synthetic_batch = synthetic_tokens(model)
        self.run = run
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            optimizers=optimizers,
        )
        if self.accelerator.mixed_precision != "no":
            raise ValueError(
                f"Expected no mixed precision, got {self.accelerator.mixed_precision} from the "
                f"settings of accelerate. {_AUTOCAST}"
            )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Runs the plan, to its last step unless a callback stops it. `training_loss` is NaN.

        Raises:
            ValueError: If it is to go on from a checkpoint, or the run is not new.
        """
        if resume_from_checkpoint or trial is not None:
            raise ValueError(
                "Expected a new run, got a checkpoint or a trial to go on from: its steps would be "
                "drawn and noised a second time. Load its weights into the model, and train them "
                "by a new plan; the budgets of both add up."
            )
        self.run.check_new()
        output = super().train(None, None, ignore_keys_for_eval)
        return TrainOutput(output.global_step, math.nan, self._public(output.metrics))

    def get_train_dataloader(self) -> DataLoader:
        """Returns the logical batches of the plan."""
        rows = self.args.per_device_train_batch_size
        collate_fn = self._get_collator_with_removed_columns(self.data_collator, "training")
        workers = self.args.dataloader_num_workers
        return self.run.batches(
            self.train_dataset, physical_batch_size=rows, collate_fn=collate_fn, num_workers=workers
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns the optimizer, once model and optimizer have passed their checks."""
        optimizer = super().create_optimizer(model)
        assert isinstance(self.model, nn.Module)
        step = self.run.begin(self.model.train(), Waiting(optimizer))
        check_optimizer(optimizer, step.engine)
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Returns the next batches; their tokens are not counted, being private."""
        return list(islice(epoch_iterator, num_batches)), None

    def training_step(
        self, model: nn.Module, inputs: object, num_items_in_batch: object = None
    ) -> Tensor:
        """Makes the private gradients of one step; returns 0 in place of the loss."""
        model.train()
        self.run.take(inputs)
        return torch.zeros((), device=self.args.device)

    def floating_point_ops(self, inputs: object) -> int:
        """Returns 0: how much there is to compute tells how many records were drawn."""
        return 0

    def num_examples(self, dataloader: DataLoader) -> int:
        """Returns the declared number of training records, or the true number of others."""
        public_size = self.run.plan.sampler.public_size
        if dataloader is self.run.loader and public_size is not None:
            return public_size
        return super().num_examples(dataloader)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what is public, and the epsilon spent so far."""
        super().log({**self._public(logs), "epsilon": self.run.epsilon}, start_time)

    def _public(self, logs: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in logs.items() if name not in _PRIVATE}


def synthetic_tokens(model: Any) -> Batch:
    """Returns made-up token ids, labels and masks for a causal model, padded at the end.

    Args:
        model: A model of transformers, whose configuration declares its vocabulary.
    """
    vocabulary: int = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (4, 8), generator=generator)
    mask = (torch.arange(8) < torch.tensor([[8], [3], [5], [7]])).long()
    labels = torch.where(mask == 1, ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _check_arguments(args: TrainingArguments, num_steps: int) -> None:
    """Raises unless the settings leave drawing, clipping and counting to the plan."""
    if args.max_steps != num_steps:
        raise ValueError(
            f"Expected max_steps={num_steps} as in the privacy plan, got {args.max_steps}. The "
            "schedule of the learning rate counts on it: set max_steps=plan.num_steps."
        )
    for name, (taken, reason) in _REFUSED.items():
        given = vars(args).get(name, taken)  # not every version has every setting
        if given != taken and (given or taken):
            raise ValueError(f"Expected {name}={taken!r}, got {given!r}. {reason}")
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError(
            f"Expected one process and one device, got world_size={args.world_size} and "
            f"n_gpu={args.n_gpu}. {_PARALLEL} Of several GPUs choose one: CUDA_VISIBLE_DEVICES=0."
        )
