"""Code that breaks a command on purpose, to be run in its process before it starts."""

WATCH = """
import hashlib, os
from dpsgd.noise import Gaussian
_add, _append = Gaussian.add_, os.O_WRONLY | os.O_CREAT | os.O_APPEND
def add_(self, sums, std, step, offsets=None):
    _add(self, sums, std, step, offsets)
    total = hashlib.sha256()
    for tensor in sums.values():
        total.update(tensor.contiguous().numpy().tobytes())
    file = os.open({path!r}, _append)
    _write(file, f"{{step}} {{total.hexdigest()}}\\n".encode())
    os.close(file)
_write = os.write
Gaussian.add_ = add_
"""
"""Notes the number and the hash of every release in a file."""

POINTS = """
import os, signal
_calls = 0
def _dies(where):
    global _calls
    _calls += 1
    if {at} == _calls:
        os.kill(os.getpid(), signal.SIGKILL)
    if {at} < 0:
        file = os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        _true["write"](file, f"{{where}}\\n".encode())
        os.close(file)
def _half(file, data):
    if {at} == _calls + 1:
        _true["write"](file, bytes(data)[: len(data) // 2])
    _dies("mid-write")
    done = _true["write"](file, data)
    _dies("written")
    return done
def _wrapped(name):
    def call(*arguments, **options):
        _dies(f"before {{name}}")
        result = _true[name](*arguments, **options)
        _dies(f"after {{name}}")
        return result
    return call
_true = {{name: getattr(os, name) for name in ("write", "fsync", "replace", "unlink")}}
for _name in ("fsync", "replace", "unlink"):
    setattr(os, _name, _wrapped(_name))
os.write = _half
"""
"""Kills the process at a numbered place: before, after or in the middle of whatever changes a disk.

With a negative number nothing dies, and each place is noted in a file.
"""

FAILS = """
import errno, os
_calls, _real = 0, os.{name}
def _failing(*arguments, **options):
    global _calls
    _calls += 1
    if _calls >= {at}:
        raise OSError(errno.{code}, os.strerror(errno.{code}))
    return _real(*arguments, **options)
os.{name} = _failing
"""
"""From its n-th call on, a function of `os` fails."""

MEMORY = """
import torch
from dpsgd.private_step import PrivateStep
_accumulate = PrivateStep.accumulate
def accumulate(self, batch, mask=None):
    if len(batch[0]) > {most}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return _accumulate(self, batch, mask)
PrivateStep.accumulate = accumulate
"""
"""Memory for so many rows and no more."""
