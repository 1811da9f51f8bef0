"""Files that a crash leaves whole: old or new, never half, and nothing that was not said."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PUBLIC = 0o666
SECRET = 0o600

MARK = ".writing-"


def write(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """Replaces a file as a whole; when this returns, it is on the disk.

    A temporary file in the same directory is written, flushed to the disk, read back and renamed;
    then the directory is flushed. Killed at any moment, it leaves the old file or the new one.

    Args:
        path: The file.
        data: Its new content.
        mode: Its permissions, less the process's umask.

    Raises:
        OSError: If the disk is full or broken, or the directory cannot be written. The old file is
            still there.
    """
    descriptor, name = tempfile.mkstemp(prefix=MARK, dir=path.parent)  # 0600 from the start
    try:
        try:
            append(descriptor, data)
            os.fchmod(descriptor, mode & ~_umask())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if Path(name).read_bytes() != data:
            raise OSError(5, "what was written does not read back", str(path))
        os.replace(name, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError) and error.filename in (None, name):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync_directory(path.parent)


def append(descriptor: int, data: bytes) -> None:
    """Writes all of the bytes to an open file."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_directory(path: Path) -> None:
    """Flushes names and renames in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files and folders that a killed process left in a directory."""
    for path in folder.glob(f"{MARK}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a directory against other processes; ends with the process however that ends.

    Raises:
        BlockingIOError: If another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
