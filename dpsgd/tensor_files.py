"""How the tensors of a checkpoint lie on the disk: in one file, or in one per process."""

from __future__ import annotations

import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpsgd import durable
from dpsgd.engines.sharding import is_sharded
from dpsgd.lost_peers import lost_peers
from dpsgd.parallel import Parallel, World

_PIECE = 1 << 24


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint that each process reads its part of, when it needs it.

    Attributes:
        folder: Where the files are.
        name: Its name in them.
        shape: The shape of the whole.
        dtype: Its type, `float32` for example.
        sharded: Whether each process had a part of it.
    """

    folder: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    sharded: bool

    def empty(self, mesh: Any) -> Tensor:
        """Returns memory for it, this process's part if there is a mesh to shard it over."""
        dtype = getattr(torch, self.dtype)
        if not self.sharded or mesh is None:
            return torch.empty(self.shape, dtype=dtype)
        from torch.distributed.tensor import Shard
        from torch.distributed.tensor import empty as empty_shard

        return empty_shard(self.shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])


class TensorFiles(ABC):
    """Writes the tensors of checkpoints."""

    @abstractmethod
    def write(self, stem: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Writes tensors by name, durably, and returns what a manifest has to say of them.

        Args:
            stem: Path of the checkpoint without an ending.
            tensors: The tensors.

        Raises:
            OSError: If they cannot be written.
        """

    @abstractmethod
    def take_part(self, tensors: Mapping[str, Tensor]) -> None:
        """Does what `write` needs of the processes that do not call it."""


class OneFile(TensorFiles):
    """All tensors in STEM.safetensors: each process has all of them, so one writes."""

    def write(self, stem: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Writes the file."""
        from safetensors.torch import save

        data = save({name: _on_cpu(tensor) for name, tensor in tensors.items()})
        path = stem.with_suffix(".safetensors")
        durable.write(path, data)
        return {"files": {path.name: hashlib.sha256(data).hexdigest()}, "shards": None}

    def take_part(self, tensors: Mapping[str, Tensor]) -> None:
        """Does nothing."""


class Shards(TensorFiles):
    """A safetensors file per process in STEM.shards/, by torch.distributed.checkpoint.

    Args:
        world: The processes; those that do not lead take part in each `write`.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def write(self, stem: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Writes the folder."""
        folder = stem.with_suffix(".shards")
        shutil.rmtree(folder, ignore_errors=True)
        _save(self._world.broadcast(str(folder)), tensors)
        files = {f"{folder.name}/{path.name}": _flushed(path) for path in sorted(folder.iterdir())}
        durable.sync_directory(folder)
        described = {
            name: (list(x.shape), str(x.dtype).removeprefix("torch."), is_sharded({name: x}))
            for name, x in tensors.items()
        }
        return {"files": files, "shards": described}

    def take_part(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes this process's part."""
        _save(self._world.broadcast(""), tensors)


def files_of(parallel: Parallel) -> TensorFiles:
    """Returns how the tensors of a model that is trained in this way are written."""
    return OneFile() if parallel.mesh is None else Shards(parallel.world)


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file.

    Raises:
        OSError: If it cannot be read.
    """
    made = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            made.update(piece)
    return made.hexdigest()


def stored(folder: Path, described: Mapping[str, Any]) -> dict[str, Stored]:
    """Returns what `Shards.write` said of the tensors in a folder, as tensors to be read."""
    return {
        name: Stored(str(folder), name, tuple(shape), dtype, sharded)
        for name, (shape, dtype, sharded) in described.items()
    }


def read(value: Any, mesh: Any, alone: bool) -> Any:
    """Returns nested values with every `Stored` in them read; the rest is as it was.

    Args:
        value: Mappings, lists and tuples of anything.
        mesh: What to shard the tensors over that were sharded, None to read all of them.
        alone: Whether this process reads alone; otherwise all of the job do at once.
    """
    wanted: dict[str, Stored] = {}
    _collect(value, wanted)
    if not wanted:
        return value
    from torch.distributed import checkpoint

    tensors = {name: tensor.empty(mesh) for name, tensor in wanted.items()}
    folder = next(iter(wanted.values())).folder
    with lost_peers():
        checkpoint.load(
            tensors, storage_reader=checkpoint.HuggingFaceStorageReader(folder), no_dist=alone
        )
    return _filled(value, tensors)


def _save(folder: str, tensors: Mapping[str, Tensor]) -> None:
    from torch.distributed import checkpoint

    writer = checkpoint.HuggingFaceStorageWriter(folder, save_distributed=True)
    try:
        with lost_peers():
            checkpoint.save(dict(tensors), storage_writer=writer)
    except checkpoint.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise OSError(f"the checkpoint '{folder}' cannot be written: {first}") from error


def _flushed(path: Path) -> str:
    """The digest of a file that is on the disk for certain."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return digest(path)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", memory_format=torch.contiguous_format).clone()


def _collect(value: Any, found: dict[str, Stored]) -> None:
    if isinstance(value, Stored):
        found[value.name] = value
    elif isinstance(value, Mapping):
        for inner in value.values():
            _collect(inner, found)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _collect(inner, found)


def _filled(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Stored):
        return tensors[value.name]
    if isinstance(value, Mapping):
        return {key: _filled(inner, tensors) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(inner, tensors) for inner in value)
    return value
