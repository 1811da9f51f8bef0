"""Stopping when asked to: Ctrl-C, SIGTERM, and Slurm's SIGUSR1 before a job's time is up."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
_SHELL = 128


class Stop:
    """Whether somebody asked to stop, and by which signal.

    Args:
        quiet: Whether to say nothing of it.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self._quiet = quiet

    @property
    def asked(self) -> bool:
        """Whether the work should end at the next good place."""
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(_SHELL + number)  # at once: what is on the disk is always enough to go on
        self.signal = signal.Signals(number)
        if self._quiet:
            return
        words = f"\n{self.signal.name}: stopping after this step; once more exits at once.\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, words.encode())


@contextmanager
def stopping(quiet: bool = False) -> Iterator[Stop]:
    """Turns the first of these signals into a request, and the second into an exit at once.

    Outside of the main thread, where Python lets nobody handle signals, nothing is changed.

    Args:
        quiet: Whether to say nothing when one comes.
    """
    stop = Stop(quiet)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop._handle) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
