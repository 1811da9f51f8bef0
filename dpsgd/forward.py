"""How a configuration wants the forward pass: in which precision, and what of it is kept."""

from __future__ import annotations

from omegaconf import DictConfig

from dpsgd.config import placement
from dpsgd.engines import Engine, LossFn, Opacus, Vmap
from dpsgd.precision import with_autocast
from dpsgd.recomputation import Recomputed


def loss_of(config: DictConfig, loss_fn: LossFn) -> LossFn:
    """Returns the loss of single records with autocast and checkpoints as configured.

    Raises:
        ValueError: If `autocast` is not what it may be.
    """
    if config.trainer.activation_checkpointing:
        loss_fn = Recomputed(loss_fn)
    return with_autocast(loss_fn, config.autocast, placement(config).dtype)


def check_engine(config: DictConfig, engine: Engine) -> None:
    """Raises for engines that cannot recompute.

    `torch.func` knows no hooks on saved tensors; Opacus records a layer anew when it runs again.

    Raises:
        ValueError: If activations are to be recomputed under such an engine.
    """
    if config.trainer.activation_checkpointing and isinstance(engine, Vmap | Opacus):
        raise ValueError(
            "Expected engine=ghost, hooks or loop with trainer.activation_checkpointing=true, got "
            f"{type(engine).__name__}, which cannot run a block a second time. Use engine=ghost, "
            "or a smaller trainer.physical_batch_size."
        )
