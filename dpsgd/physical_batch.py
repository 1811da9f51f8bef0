"""How many rows are in memory at once: as asked for, or found by trial on made-up records."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import RenderableType

from dpsgd.benchmark.meters import MaxResidentSet, ResidentSet, meter_for, return_freed_memory
from dpsgd.engines.memory import is_out_of_memory
from dpsgd.free_memory import address_space_limit, free_memory
from dpsgd.plan import PrivacyPlan
from dpsgd.report import caution
from dpsgd.trainer import Trainer

AUTO = "auto"

_HALVED = "A physical batch did not fit into the memory. It has {} rows from now on."
_FOUND = "Physical batches have {} rows, found by trial on made-up records."
_MIB = 2**20
_SHARE = 0.7
"""Of the host memory that is free, how much a physical batch may take."""
_RUNNING = 256 * _MIB
"""Host memory left to threads, logs and checkpoints, which begin after the trials."""
_RESERVED = 4
"""How often the parameters fit, in float32, into what is left to the optimizer and the noise."""


def first_rows(asked: Any) -> int:
    """Returns the rows to set up a trainer with: those asked for, or 1 before `auto` has found any.

    Raises:
        ValueError: If it is neither a positive whole number nor `auto`.
    """
    if asked == AUTO:
        return 1
    if isinstance(asked, str) and asked.isdecimal():  # from the environment, for example
        asked = int(asked)
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise ValueError(
            f"Expected trainer.physical_batch_size >= 1, a whole number, or auto, got {asked!r}."
        )
    return asked


def settle(trainer: Trainer, asked: Any) -> list[RenderableType]:
    """Makes sure that a physical batch fits, before any privacy is spent; returns what to tell.

    Args:
        trainer: The trainer; its physical batch size is set.
        asked: The setting, a number or `auto`.

    Raises:
        ValueError: If not even a small one fits.
    """
    before = trainer.physical_batch_size
    if asked == AUTO:
        before = trainer.physical_batch_size = _found(trainer)
    trainer.warm_up()
    rows = trainer.physical_batch_size
    if asked == AUTO:
        return [_FOUND.format(rows)]
    if rows < min(before, trainer.plan.sampler.largest_batch()):
        return [caution(_HALVED.format(rows))]
    return []


def most_rows(plan: PrivacyPlan) -> int:
    """Returns the smallest power of two that holds the expected batch: more would be padding.

    It follows from the plan alone, never from a drawn batch.
    """
    expected = min(math.ceil(plan.batch_sizes[1]), plan.sampler.largest_batch())
    return 1 << (max(1, expected) - 1).bit_length()


@dataclass(frozen=True)
class Memory:
    """What trials are measured by, in bytes.

    Attributes:
        free: What is to be had for a batch, infinite where running out of it is an error that can
            be caught.
        grown: Returns by how much memory has grown at most since the trials began.
    """

    free: float
    grown: Callable[[], float]


def largest_fitting(
    trial: Callable[[int], None],
    most: int,
    memory: Memory,
    everywhere: Callable[[bool], bool] = bool,
) -> int:
    """Returns the largest power of two of rows, up to `most`, that fits.

    The rows are doubled until running out of memory says that they do not fit; on a host, which
    kills processes instead, until the growth so far predicts that they will not.

    Args:
        trial: Runs a batch of so many rows.
        most: A power of two.
        memory: What is to be had, and how much was taken.
        everywhere: Returns whether all processes of the job say yes: they try the same rows.

    Raises:
        ValueError: If not even one row fits.
    """
    rows, taken, size = 0, 0.0, 1
    while size <= most and everywhere(_runs(trial, size)):
        before, taken, rows = taken, memory.grown(), size
        if not everywhere(max(2 * taken, taken + 2 * (taken - before)) <= memory.free):
            break
        size *= 2
    if not rows:
        raise ValueError(
            "Expected memory for a physical batch, but not even one row fits. Set "
            "autocast=bfloat16 or trainer.activation_checkpointing=true, or take a smaller model."
        )
    return rows


def _runs(trial: Callable[[int], None], rows: int) -> bool:
    try:
        trial(rows)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _found(trainer: Trainer) -> int:
    """The largest power of two that fits beside what optimizer and noise need later."""
    parameters = trainer.step.engine.parameters.values()
    device = next(iter(parameters)).device
    reserved = _RESERVED * 4 * sum(p.numel() for p in parameters)

    def trial(rows: int) -> None:
        held = torch.empty(reserved, dtype=torch.uint8, device=device)
        trainer.physical_batch_size = rows
        trainer.try_physical_batch()
        del held

    parallel = trainer.step.parallel
    memory = _memory(device, reserved, caught=not parallel.even)

    def everywhere(yes: bool) -> bool:
        return all(parallel.world.gather(yes))

    rows = largest_fitting(trial, most_rows(trainer.plan), memory, everywhere)
    gc.collect()  # what the trial that failed left behind
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _memory(device: torch.device, reserved: int, caught: bool) -> Memory:
    """Memory as it is now.

    Args:
        device: Where batches go.
        reserved: Bytes that must stay free.
        caught: Whether a pass may run out of memory: not if other processes wait for its end.
    """
    if device.type == "cuda" and caught:
        return Memory(math.inf, lambda: 0.0)
    meter = meter_for(device)
    return_freed_memory()
    begun = meter.current()
    if isinstance(meter, MaxResidentSet):  # an old peak counts as growth: rather too much
        try:
            begun = ResidentSet().current()
        except OSError:
            begun = 0.0
    meter.reset()
    if device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0])
    else:
        free = free_memory(address_space=address_space_limit())
    return Memory(_SHARE * free - reserved - _RUNNING, lambda: (meter.peak() - begun) * _MIB)
