"""Meters of peak memory, in MiB."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from abc import ABC, abstractmethod
from pathlib import Path

import torch

_MIB = 2**20
_PROC = Path("/proc/self")


class Meter(ABC):
    """Reads how much memory is held, and the most that was held since the last reset.

    Attributes:
        method: What is read.
    """

    method: str

    @abstractmethod
    def current(self) -> float:
        """Returns what is held now, in MiB."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets the peak so far, where the system lets it."""

    @abstractmethod
    def peak(self) -> float:
        """Returns the peak since the last reset, in MiB."""


class Cuda(Meter):
    """Tensors on a CUDA device, as PyTorch's allocator counts them."""

    method = "torch.cuda.max_memory_allocated"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current(self) -> float:
        """Returns the memory of living tensors, in MiB."""
        return torch.cuda.memory_allocated(self._device) / _MIB

    def reset(self) -> None:
        """Starts anew."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> float:
        """Returns the most that tensors held at once, in MiB."""
        return torch.cuda.max_memory_allocated(self._device) / _MIB


class ResidentSet(Meter):
    """The process's resident set on Linux, with a peak that can be reset."""

    method = "VmHWM of /proc/self/status, reset by /proc/self/clear_refs"

    def current(self) -> float:
        """Returns the resident set, in MiB."""
        return self._field("VmRSS")

    def reset(self) -> None:
        """Sets the peak to what is held now.

        Raises:
            OSError: If the system does not let it.
        """
        (_PROC / "clear_refs").write_text("5")

    def peak(self) -> float:
        """Returns the largest resident set since the last reset, in MiB."""
        return self._field("VmHWM")

    def _field(self, name: str) -> float:
        match = re.search(rf"^{name}:\s+(\d+) kB", (_PROC / "status").read_text(), re.MULTILINE)
        if match is None:
            raise OSError(f"no {name} in {_PROC / 'status'}")
        return int(match[1]) / 1024


class MaxResidentSet(Meter):
    """The largest resident set of the process's life, where nothing better is to be had.

    It cannot be reset: growth over an earlier peak is all that it shows.
    """

    method = "ru_maxrss of getrusage, never reset: includes the first step"

    def current(self) -> float:
        """Returns the peak, in MiB."""
        return self.peak()

    def reset(self) -> None:
        """Does nothing."""

    def peak(self) -> float:
        """Returns the largest resident set so far, in MiB."""
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB


def meter_for(device: torch.device) -> Meter:
    """Returns the meter for a device; on the CPU (and mps) that of the host's memory."""
    if device.type == "cuda":
        return Cuda(device)
    meter = ResidentSet()
    try:
        meter.reset()
        meter.current()
        meter.peak()
    except OSError:
        return MaxResidentSet()
    return meter


def return_freed_memory() -> None:
    """Gives freed memory back to the system, so that the resident set shows what is in use."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has this function
        ctypes.CDLL(None).malloc_trim(0)
