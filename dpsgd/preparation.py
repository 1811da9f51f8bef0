"""From a configuration to a trainer, checked before a run directory is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from dpsgd import checks, rng
from dpsgd.components import build
from dpsgd.config import placement
from dpsgd.data import Dataset
from dpsgd.losses import PerUser
from dpsgd.planning import privacy_plan
from dpsgd.sampling import UserPoisson
from dpsgd.saved_run import load_weights
from dpsgd.seeding import seed_everything
from dpsgd.trainer import Trainer


def assembled(config: DictConfig) -> dict[str, Any]:
    """Returns the components of a configuration, seeded, with the data checked.

    Raises:
        ValueError: If one cannot be built.
    """
    seed_everything(config.seed)
    parts = build(config)
    data = parts["data"]
    if not isinstance(data, Dataset):
        raise ValueError(f"Expected data to be a dpsgd.data.Dataset, got {type(data).__name__}.")
    return parts


def prepare(
    config: DictConfig, parts: Mapping[str, Any], streams: bytes
) -> tuple[Trainer, checks.Preflight]:
    """Returns a trainer with everything that a run needs, checked, and what was found.

    Args:
        config: A resolved configuration.
        parts: Its components, as `assembled` makes them.
        streams: What the keys of noise and sampling are derived from.

    Raises:
        ValueError: If the configuration or the model is unsound.
    """
    place, data = placement(config), parts["data"]
    model = place.model(parts["model"])
    if config.model.init_from is not None:
        load_weights(model, config.model.init_from)
    sampler = parts["sampler"](key=rng.derive(streams, "sampler"))
    plan = privacy_plan(config, sampler, parts["clipping"])
    loss_fn, batch = parts["loss"], checks.synthetic_batch(data, 4)
    if isinstance(plan.sampler, UserPoisson):
        loss_fn = PerUser(loss_fn)
        batch = checks.synthetic_users(data, 4, plan.sampler.records_per_user)
    engine = parts["engine"](model, loss_fn)
    passed = checks.preflight(engine, place.batch(batch))
    plan.clipping.groups(list(engine.parameters))
    optimizer = parts["optimizer"](list(engine.parameters.values()))
    noise = parts["noise"](key=rng.derive(streams, "noise"))
    trainer = Trainer(
        plan.private_step(engine, optimizer, noise),
        data,
        plan,
        physical_batch_size=config.trainer.physical_batch_size,
        evaluate_every=config.trainer.evaluate_every,
        seed=config.seed,
    )
    return trainer, passed
