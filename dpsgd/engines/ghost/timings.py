"""How long strategies took, remembered on disk: times of made-up tensors, nothing of the data."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

_REPETITIONS = 3


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Returns how long a call takes: the best of some, the first one not counted.

    Args:
        function: What to call.
        device: What to wait for.
    """
    _once(function, device)
    return min(_once(function, device) for _ in range(_REPETITIONS))


def _once(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class Timings:
    """Times on this machine, with this PyTorch and this number of threads, one file for all runs.

    A file that cannot be read or written is done without: times are taken again then.

    Args:
        device: Where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        environment = [
            platform.node(),
            platform.machine(),
            str(os.cpu_count()),
            str(torch.get_num_threads()),
            torch.__version__,
            name,
        ]
        digest = hashlib.sha256("\0".join(environment).encode()).hexdigest()[:16]
        self._path = cache_dir() / f"strategies-{digest}.json"
        self._times = self._read()
        self._known = {key: dict(times) for key, times in self._times.items()}

    def of(self, key: str) -> dict[str, float]:
        """Returns the times by strategy for one kind of call, none if it is unknown."""
        return self._times.get(key, {})

    def note(self, key: str, times: Mapping[str, float]) -> None:
        """Remembers the times for one kind of call."""
        self._times[key] = dict(times)

    def save(self) -> None:
        """Writes what is new."""
        if self._times == self._known:
            return
        times = self._read() | self._times
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(times, file, indent=1)
                os.replace(temporary, self._path)
            except OSError:
                os.unlink(temporary)

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return {
                str(key): {str(name): float(value) for name, value in times.items()}
                for key, times in found.items()
            }
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            return {}


def cache_dir() -> Path:
    """Returns the user's cache directory for dpsgd; `DPSGD_CACHE` names another one."""
    named = os.environ.get("DPSGD_CACHE")
    if named:
        return Path(named)
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():  # a user without a home: a container, for example
        home = Path(tempfile.gettempdir())
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "dpsgd"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "dpsgd"
