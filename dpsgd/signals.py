"""Stopping when asked to: Ctrl-C, SIGTERM, and what Slurm sends before a job's time is up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2  # 2: submitit's choice
_SHELL = 128


def _say(words: str) -> None:
    with suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{words}\n".encode())


class Stop:
    """Whether somebody asked to stop, and by which signal.

    Args:
        patient: Whether further signals are ignored, because the process that started this one
            kills it if need be; otherwise the second one ends it at once.
        quiet: Whether to say nothing of it.
    """

    def __init__(self, patient: bool = False, quiet: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self._patient, self._quiet, self._abrupt = patient, patient or quiet, False

    @property
    def asked(self) -> bool:
        """Whether the work should end at the next good place."""
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and self._patient:
            return
        if self.asked:
            os._exit(_SHELL + number)  # at once: what is on the disk is always enough to go on
        self.signal = signal.Signals(number)
        if self._abrupt:
            raise KeyboardInterrupt
        if not self._quiet:
            _say(f"{self.signal.name}: stopping after this step; once more exits at once.")


class JobStop(Stop):
    """The same for a process that does one job of a sweep after the other.

    Its handlers stay, so that no signal between two jobs is lost. Before the steps of a job and
    after them, a signal ends it at once.
    """

    def __init__(self, patient: bool) -> None:
        super().__init__(patient)
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # see `relaying`

    @contextmanager
    def ending(self, abruptly: bool) -> Iterator[None]:
        """Whether a signal raises KeyboardInterrupt here, or is a request only."""
        before, self._abrupt = self._abrupt, abruptly
        try:
            yield
        finally:
            self._abrupt = before

    def hand_over(self) -> None:
        """Calls what handled the signal before, if a launcher had set it: submitit's requeueing.

        That ends the process if it submits the job anew; it raises if it does not.
        """
        before = None if self.signal is None else self._before.get(self.signal)
        if callable(before) and before is not signal.default_int_handler:
            with suppress(Exception):
                before(self.signal, None)


_of_jobs: JobStop | None = None


def of_jobs(patient: bool) -> JobStop:
    """Returns the lasting `JobStop` of this process, made with the first job."""
    global _of_jobs
    if _of_jobs is None:
        _of_jobs = JobStop(patient)
    return _of_jobs


@contextmanager
def stopping(quiet: bool = False) -> Iterator[Stop]:
    """Turns the first of these signals into a request, and the second into an exit at once.

    Outside of the main thread, where Python lets nobody handle signals, nothing is changed. A job
    of a sweep shares the request with the jobs after it.

    Args:
        quiet: Whether to say nothing when one comes.
    """
    if _of_jobs is not None:
        with _of_jobs.ending(abruptly=False):
            yield _of_jobs
        return
    stop = Stop(quiet=quiet)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop._handle) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def relaying() -> None:
    """From here on, the first signal goes to the child processes, and the second kills them.

    Children inherit that the signals are blocked, until `of_jobs` handles them there: none is
    killed by Ctrl-C while it still starts. Without children a signal is a KeyboardInterrupt.
    """
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        children = multiprocessing.active_children()
        if not children:
            raise KeyboardInterrupt
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child.pid or 0, signal.SIGKILL if asked else signal.SIGUSR1)
        if asked:
            os._exit(_SHELL + number)
        asked = True
        _say(f"{signal.Signals(number).name}: each job stops after its step; once more kills them.")

    for number in _SIGNALS:
        signal.signal(number, handle)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_receive, daemon=True).start()


def _receive() -> None:
    """Lets the signals in, of which Python handles each in the main thread."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Event().wait()
