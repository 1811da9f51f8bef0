"""From a configuration to a trainer, checked before a run directory is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import RenderableType
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from dpsgd import checks, rng
from dpsgd.components import build, finished, takes
from dpsgd.config import placement
from dpsgd.data import Dataset
from dpsgd.engines import Engine
from dpsgd.forward import check_engine, loss_of
from dpsgd.learning_rates import tabulated
from dpsgd.losses import MeanOfViews, PerUser
from dpsgd.noise import Gaussian
from dpsgd.parallel import Parallel
from dpsgd.parallel.world import this_job
from dpsgd.physical_batch import first_rows, settle
from dpsgd.planning import privacy_plan
from dpsgd.recipe import Recipe
from dpsgd.resuming import Start
from dpsgd.sampling import Sampler, UserPoisson
from dpsgd.saved_run import load_weights
from dpsgd.seeding import seed_everything
from dpsgd.trainer import Trainer


def assembled(config: DictConfig) -> dict[str, Any]:
    """Returns the components of a configuration, seeded, with the data checked.

    Raises:
        ValueError: If one cannot be built.
    """
    every = config.checkpoint.every
    if every is not None and every < 1:
        raise ValueError(f"Expected checkpoint.every >= 1, or null for none, got {every}.")
    first_rows(config.trainer.physical_batch_size)  # raises early
    seed_everything(config.seed)
    parts = build(config)
    data = parts["data"]
    if not isinstance(data, Dataset):
        raise ValueError(f"Expected data to be a dpsgd.data.Dataset, got {type(data).__name__}.")
    parallel = parts["parallel"]
    if not isinstance(parallel, Parallel):
        got = type(parallel).__name__
        raise ValueError(f"Expected parallel to be a dpsgd.parallel.Parallel, got {got}.")
    size = this_job().size
    if parallel.world.size != size:
        raise ValueError(
            f"Expected parallel=ddp or parallel=fsdp in a job of {size} processes: otherwise each "
            "would train a model of its own in the same directory."
        )
    return parts


def prepare(
    config: DictConfig, parts: Mapping[str, Any], streams: bytes
) -> tuple[Trainer, checks.Preflight]:
    """Returns a trainer with everything that a run needs, checked, and what was found.

    Args:
        config: A resolved configuration.
        parts: Its components, as `assembled` makes them; the model is sharded, if at all, after it
            has passed its checks.
        streams: What the keys of noise and sampling are derived from.

    Raises:
        ValueError: If the configuration or the model is unsound.
    """
    place, data = placement(config), parts["data"]
    if not isinstance(parts["model"], nn.Module):
        got = type(parts["model"]).__name__
        raise ValueError(f"Expected model to be an nn.Module, got {got}.")
    model = place.model(parts["model"])
    if config.model.init_from is not None:
        load_weights(model, config.model.init_from)
    sampler = finished("sampler", parts["sampler"], Sampler, key=rng.derive(streams, "sampler"))
    plan = privacy_plan(config, sampler, parts["clipping"])
    recipe = _recipe(config, parts, plan.num_steps)
    loss_fn = loss_of(config, parts["loss"])
    if recipe.augmentation is not None:
        loss_fn = MeanOfViews(loss_fn)
    if isinstance(plan.sampler, UserPoisson):
        loss_fn = PerUser(loss_fn)
    engine = finished("engine", parts["engine"], Engine, model, loss_fn)
    check_engine(config, engine)
    batch = checks.synthetic_units(data, 4, plan.sampler, recipe.augmentation)
    passed = checks.preflight(engine, place.batch(batch))
    plan.clipping.groups(list(engine.parameters))
    parts["parallel"].place(engine)
    parameters = list(engine.parameters.values())
    optimizer = finished("optimizer", parts["optimizer"], torch.optim.Optimizer, parameters)
    noise = finished("noise", parts["noise"], Gaussian, key=rng.derive(streams, "noise"))
    trainer = Trainer(
        plan.private_step(engine, optimizer, noise, parts["parallel"]),
        data,
        plan,
        physical_batch_size=first_rows(config.trainer.physical_batch_size),
        evaluate_every=config.trainer.evaluate_every,
        seed=config.seed,
        recipe=recipe,
    )
    return trainer, passed


def _recipe(config: DictConfig, parts: Mapping[str, Any], num_steps: int) -> Recipe:
    """The recipe of a configuration, its learning rates written out."""
    stand_in = [nn.Parameter(torch.zeros(1))]
    optimizer = finished("optimizer", parts["optimizer"], torch.optim.Optimizer, stand_in)
    schedule = parts["schedule"]
    options = {"num_steps": num_steps} if takes(schedule, "num_steps") else {}

    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        return finished("schedule", schedule, LRScheduler, optimizer, **options)

    return Recipe(
        augmentation=parts["augmentation"],
        rates=tabulated(scheduler, optimizer, num_steps),
        ema_decay=config.trainer.ema_decay,
    )


def make_ready(trainer: Trainer, start: Start, asked: Any) -> list[RenderableType]:
    """Settles how steps are computed, as in the run that goes on, or by a trial.

    Args:
        trainer: The trainer.
        start: How the run starts.
        asked: The rows of a physical batch, a number or `auto`.

    Returns:
        What the user should be told.
    """
    if not start.replays or start.checkpoint is None:
        return settle(trainer, asked)
    trainer.physical_batch_size = start.checkpoint.facts["physical_batch_size"]
    trainer.step.engine.choices.made.update(start.checkpoint.facts["choices"])
    trainer.step.engine.choices.final = True
    return []
