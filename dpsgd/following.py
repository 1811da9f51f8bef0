"""A run in the processes that do not lead: the same steps, and no file."""

from __future__ import annotations

from omegaconf import DictConfig
from torch import Tensor

from dpsgd import replay, resuming
from dpsgd.checkpoint import without_tensors
from dpsgd.parallel import World
from dpsgd.preparation import assembled, make_ready, prepare
from dpsgd.resuming import Start
from dpsgd.running import load, steps_of
from dpsgd.signals import stopping
from dpsgd.tensor_files import files_of
from dpsgd.trainer import Trainer


def follow(config: DictConfig, world: World) -> bool:
    """Trains along with the process that leads, which says how the run starts.

    Returns:
        Whether it was interrupted.

    Raises:
        ValueError: If this process cannot do what the others do.
    """
    if not world.broadcast(False):
        return False
    parts = assembled(config)
    replay.agree(config, world)
    start = world.broadcast(None)
    assert isinstance(start, Start)
    resuming.check_records(parts["data"], start, world)
    trainer, _ = prepare(config, parts, start.streams)
    make_ready(trainer, start, config.trainer.physical_batch_size)
    until = world.broadcast(0)
    load(trainer, start)
    with stopping(quiet=True) as stop:
        if not start.replays:
            _take_part(trainer)
        for _, due in steps_of(trainer, until, config.checkpoint.every, stop):
            if due:
                _take_part(trainer)
    with trainer.weights_to_publish():
        trainer.step.parallel.weights(trainer.step.engine.model)
    return trainer.step.step < until


def _take_part(trainer: Trainer) -> None:
    """Writes this process's part of a checkpoint, if it has one."""
    parallel = trainer.step.parallel
    if parallel.mesh is not None:
        tensors: dict[str, Tensor] = {}
        without_tensors(trainer.step.state_dict(), tensors)
        files_of(parallel).take_part(tensors)
