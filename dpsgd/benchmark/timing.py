"""Times of whole steps, the systems taking turns: A B C A B C."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from dpsgd.benchmark.systems import Step, failure


@dataclass(frozen=True)
class Schedule:
    """How often steps are taken.

    Attributes:
        warmup: Steps of each system before the clock counts, >= 1: engines check and compile then.
        repetitions: Timed steps of each system, >= 1.
        max_seconds: Time that one system may take; slower ones get fewer repetitions, one at least.

    Raises:
        ValueError: If a number is out of range.
    """

    warmup: int
    repetitions: int
    max_seconds: float

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("warmup", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected bench.{name} >= 1, got {getattr(self, name)}.")
        if not self.max_seconds > 0:
            raise ValueError(f"Expected bench.max_seconds > 0, got {self.max_seconds}.")

    def allowed(self, seconds: float) -> int:
        """Returns how many repetitions a system gets whose step takes so long."""
        return max(1, min(self.repetitions, int(self.max_seconds / max(seconds, 1e-9))))


@dataclass(frozen=True)
class Tick:
    """One step that was taken or failed.

    Attributes:
        name: Name of the system.
        seconds: How long the step took.
        counts: Whether it counts, warm-up steps do not.
        page_faults: Pages of memory that the system had to provide meanwhile, where it tells.
        refusal: Why the system dropped out, None if it did not.
    """

    name: str
    seconds: float
    counts: bool
    page_faults: int | None = None
    refusal: str | None = None


def interleaved(
    steps: Mapping[str, Step], schedule: Schedule, device: torch.device
) -> Iterator[Tick]:
    """Takes the steps in turns and yields each: all warm-up rounds, then all timed ones.

    A system that fails drops out. Whoever consumes the ticks does so between steps, off the clock.

    Args:
        steps: The systems' steps by name.
        schedule: How often.
        device: What to wait for before reading the clock.
    """
    latest: dict[str, float] = {}
    running = dict(steps)

    def take(name: str, counts: bool) -> Tick:
        tick = _tick(name, running[name], counts, device)
        if tick.refusal is not None:
            del running[name]
        latest[name] = tick.seconds
        return tick

    for _ in range(schedule.warmup):
        for name in list(running):
            yield take(name, counts=False)
    allowed = {name: schedule.allowed(latest[name]) for name in running}
    for turn in range(schedule.repetitions):
        for name in list(running):
            if turn < allowed[name]:
                yield take(name, counts=True)


def _tick(name: str, step: Step, counts: bool, device: torch.device) -> Tick:
    refusal = None
    _wait_for(device)
    faults = _page_faults()
    start = time.perf_counter()
    try:
        step()
        _wait_for(device)
    except (ValueError, RuntimeError) as error:
        refusal = failure(error)
        if refusal is None:
            raise
    seconds = time.perf_counter() - start
    after = _page_faults()
    made = None if faults is None or after is None else after - faults
    return Tick(name, seconds, counts, made, refusal)


def _page_faults() -> int | None:
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
