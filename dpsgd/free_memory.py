"""How much more memory this process may take before the system kills it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_STATISTICS = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
_ENDLESS = 1 << 60


def free_memory(
    proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup"), address_space: int = -1
) -> float:
    """Returns the bytes of host memory that are to be had: the tightest of all limits.

    Those are what the system has available, the control groups of a container or a job, and the
    limit on the address space (`ulimit -v`).

    Args:
        proc: The folder of process information.
        groups: The folder of control groups, of version 2 or 1.
        address_space: The limit on the address space in bytes, -1 for none.
    """
    return max(
        0.0, min((_system(proc), *_left_in_groups(proc, groups), *_left(proc, address_space)))
    )


def address_space_limit() -> int:
    """Returns the limit on this process's address space in bytes, -1 for none."""
    try:
        import resource
    except ImportError:  # not on Windows
        return -1
    return int(resource.getrlimit(resource.RLIMIT_AS)[0])


def _system(proc: Path) -> float:
    """What is available on the whole machine; half of what it has, where that is unknown."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _text(proc / "meminfo"), re.MULTILINE)
    if match is not None:
        return int(match[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


def _left(proc: Path, limit: int) -> Iterator[float]:
    fields = _text(proc / "self" / "statm").split()
    if limit >= 0 and fields:
        yield limit - int(fields[0]) * os.sysconf("SC_PAGE_SIZE")


def _left_in_groups(proc: Path, groups: Path) -> Iterator[float]:
    """What each group that the process is in has left; caches of files count as left."""
    for line in _text(proc / "self" / "cgroup").splitlines() or ["0::/"]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        root = groups / "memory" if controllers else groups
        folder = root / path.strip("/")
        for place in (folder, *folder.parents):
            yield from _left_in(place)
            if place == root:
                break


def _left_in(group: Path) -> Iterator[float]:
    for most, used in _STATISTICS:
        limit, current = _text(group / most).strip(), _text(group / used).strip()
        if limit.isdecimal() and current.isdecimal() and int(limit) < _ENDLESS:
            cached = re.search(r"^inactive_file (\d+)", _text(group / "memory.stat"), re.MULTILINE)
            yield int(limit) - int(current) + (0 if cached is None else int(cached[1]))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
