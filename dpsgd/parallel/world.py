"""The processes of a job: who they are, and what they tell each other besides tensors of a step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dpsgd.lost_peers import lost_peers

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""How long a process waits for one that is alive and silent; a dead one is noticed at once."""

_NUMBERS = 4


@dataclass(frozen=True)
class World:
    """The processes that train one model together, or the only one.

    Everything here is a collective call: all processes make it, in the same order.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1
    _store: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def current(cls) -> World:
        """Returns the processes of torch.distributed's default group.

        Raises:
            ValueError: If there is none.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "Expected a job of several processes, got a single one. Start it with: torchrun "
                "--nproc-per-node=N -m dpsgd.train parallel=ddp ... (in a loop of your own, call "
                "torch.distributed.init_process_group() first)."
            )
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> None:
        """Adds up a tensor over the processes, in place; all get the same bits."""
        if self.size > 1:
            with lost_peers():
                dist.all_reduce(tensor)

    def broadcast(self, value: T) -> T:
        """Returns what process 0 gives."""
        if self.size == 1:
            return value
        box = [value]
        with lost_peers():
            dist.broadcast_object_list(box, src=0, device=_device())
        return box[0]

    def gather(self, value: T) -> Sequence[T]:
        """Returns what each process gives, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with lost_peers():
            dist.all_gather_object(values, value)
        return values

    def agree(self, facts: Mapping[str, Any], what: str) -> None:
        """Raises unless all processes give the same facts.

        Args:
            facts: Plain values by name; nothing secret, since they may be shown.
            what: What they are facts of, for the message.

        Raises:
            ValueError: On every process, with each fact that differs and whose it is.
        """
        everyone = self.gather({name: str(value) for name, value in facts.items()})
        names = sorted({name for given in everyone for name in given})
        lines = []
        for name in names:
            values = [given.get(name, "(absent)") for given in everyone]
            if len(set(values)) > 1:
                shown = ", ".join(f"process {rank}: {v}" for rank, v in enumerate(values))
                lines.append(f"  {name}: {shown}")
        if lines:
            raise ValueError(
                f"Expected the same {what} in all {self.size} processes, got\n" + "\n".join(lines)
            )

    def lockstep(self, place: Mapping[str, int]) -> None:
        """Raises unless all processes are at the same place: one message of a few numbers.

        Args:
            place: What must be the same, at most four whole numbers below 2^62 by name.

        Raises:
            ValueError: On every process, naming what is not the same.
        """
        if self.size == 1:
            return
        numbers = [*place.values(), *[0] * (_NUMBERS - len(place))]  # of one length for all calls
        own = torch.tensor(numbers)
        ends = torch.cat([own, -own]).to(_device())
        with lost_peers():
            dist.all_reduce(ends, dist.ReduceOp.MAX)
        most, least = ends.cpu().chunk(2)
        wrong = [name for name, differs in zip(place, most != -least, strict=False) if differs]
        if wrong:
            raise ValueError(
                f"Expected all {self.size} processes at the same place of the same step, but they "
                f"differ in: {', '.join(wrong)}. Call accumulate() and release() alike on each; "
                "of this step nothing is released."
            )

    def first_to_fail(self) -> bool:
        """Whether no other process has asked this before: one message for one failure.

        Not a collective call.
        """
        if self._store is None:
            return True
        try:
            return bool(self._store.add("failures", 1) == 1)
        except Exception:  # whoever kept count is gone
            return True


@contextmanager
def joined() -> Iterator[World]:
    """Joins the job that torchrun has started, until the end of the block; alone outside of one.

    On a CUDA machine each process takes the GPU of its local rank.

    Raises:
        NobodyThere: If the other processes cannot be reached.
    """
    if not launched():
        yield World()
        return
    from torch.distributed.rendezvous import rendezvous

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    try:
        store, rank, size = next(rendezvous("env://", rank, size, timeout=PATIENCE))
        dist.init_process_group(
            store=dist.PrefixStore("dpsgd", store), rank=rank, world_size=size, timeout=PATIENCE
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise NobodyThere(f"Cannot join the job of {size} processes: {error}") from error
    threading.Thread(target=_stop_without_launcher, args=(os.getppid(),), daemon=True).start()
    try:
        yield World(rank, size, store)
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _stop_without_launcher(launcher: int) -> None:
    """Stops this process, as SIGTERM does, once the one that started it is gone."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _device() -> torch.device:
    """Where small messages are: on the CPU, unless the group carries tensors of GPUs alone."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def this_job() -> World:
    """Returns the processes of this job, the only one outside of torchrun."""
    return World.current() if launched() else World()


def launched() -> bool:
    """Whether torchrun, or something like it, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_rank() -> int:
    """Returns the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


class NobodyThere(RuntimeError):
    """The other processes of a job cannot be reached."""
