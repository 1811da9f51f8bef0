"""Checkpoints: what a run needs to go on, as safetensors and a JSON manifest; never a pickle."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dpsgd import durable, tensor_files
from dpsgd.tensor_files import OneFile, Stored, TensorFiles

_VERSION = 2
_KEPT = 2
_NAME = re.compile(r"attempt-(\d+)-step-(\d+)\.json")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after some steps. All of it is public.

    Attributes:
        attempt: Number of the attempt at the run whose releases led here.
        step: Releases so far.
        state: Numbers, words, lists, tuples, dictionaries and tensors, nested in any way; as read
            from shards, with `Stored` instead of tensors (see `dpsgd.tensor_files.read`).
        facts: What else belongs to it, plain JSON values: what a replay depends on, for example.
    """

    attempt: int
    step: int
    state: Mapping[str, Any]
    facts: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of a run in a folder, two generations of them.

    A checkpoint is its tensors in one file or several and then, last, its manifest with the SHA-256
    of these and an HMAC-SHA-256 of itself, which is on the disk under its own name only when it is
    complete. So a crash at any moment leaves the checkpoint before, and no damaged, edited or
    foreign one is loaded.

    Args:
        folder: Where they are; made if it is missing.
        key: 32 bytes that authenticate them: whoever could change the weights of a run could have
            the noise of a step added to two different sums.
        files: How tensors are written.
    """

    def __init__(self, folder: Path, key: bytes, files: TensorFiles | None = None) -> None:
        self._folder = folder
        self._key = key
        self._files = OneFile() if files is None else files

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint and removes all but the last two.

        Raises:
            ValueError: If the state holds what cannot be stored.
            OSError: If it cannot be written; the checkpoints before it are still there.
        """
        self._folder.mkdir(exist_ok=True)
        tensors: dict[str, Tensor] = {}
        skeleton = without_tensors(checkpoint.state, tensors)
        name = self._folder / f"attempt-{checkpoint.attempt}-step-{checkpoint.step}"
        manifest = {
            "version": _VERSION,
            "attempt": checkpoint.attempt,
            "step": checkpoint.step,
            "facts": checkpoint.facts,
            "state": skeleton,
            **self._files.write(name, tensors),
        }
        text = json.dumps(manifest, separators=(",", ":"))
        durable.write(name.with_suffix(".json"), f"{self._mac(text)}\n{text}\n".encode())
        self._prune()

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Returns the newest checkpoint that is whole, None without any, and what is wrong.

        The second part names each damaged checkpoint that was passed over.
        """
        damaged: list[str] = []
        for manifest in self._manifests():
            try:
                return self._load(manifest), damaged
            except ValueError as error:
                damaged.append(f"{manifest.name}: {error}")
        return None, damaged

    def _load(self, path: Path) -> Checkpoint:
        try:
            mac, text, _ = path.read_text(encoding="ascii").split("\n")
        except OSError as error:
            raise ValueError(f"cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ValueError("the manifest is damaged") from error
        if not hmac.compare_digest(mac, self._mac(text)):
            raise ValueError("the manifest is damaged or not of this run")
        manifest = json.loads(text)  # of ours: its HMAC is right
        if manifest["version"] != _VERSION:
            raise ValueError(f"its version is {manifest['version']}, not {_VERSION}")
        state = _with_tensors(manifest["state"], self._tensors(path, manifest))
        return Checkpoint(manifest["attempt"], manifest["step"], state, manifest["facts"])

    def _tensors(self, path: Path, manifest: Mapping[str, Any]) -> Mapping[str, Tensor | Stored]:
        """The tensors of a manifest, if their files are those that it was written for."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        shards = manifest["shards"]
        try:
            if shards is None:
                ((name, expected),) = manifest["files"].items()
                data = (self._folder / name).read_bytes()
                whole = hashlib.sha256(data).hexdigest() == expected
            else:
                found = {n: tensor_files.digest(self._folder / n) for n in manifest["files"]}
                whole = found == manifest["files"]
            if not whole:
                raise ValueError("its tensors are damaged")
            if shards is None:
                return load(data)
        except OSError as error:
            raise ValueError(f"cannot be read ({error.strerror})") from error
        except SafetensorError as error:
            raise ValueError("its tensors cannot be read") from error
        return tensor_files.stored(path.with_suffix(".shards"), shards)

    def _manifests(self) -> list[Path]:
        """The manifests there are, newest first."""
        found = {p: _NAME.fullmatch(p.name) for p in self._folder.glob("*.json")}
        places = {p: (int(m[1]), int(m[2])) for p, m in found.items() if m is not None}
        return sorted(places, key=places.__getitem__, reverse=True)

    def _prune(self) -> None:
        durable.remove_leftovers(self._folder)
        kept = {path.stem for path in self._manifests()[:_KEPT]}
        for path in sorted(self._folder.glob("attempt-*"), key=lambda path: path.suffix):
            if path.stem in kept:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()  # a manifest before its tensors

    def _mac(self, text: str) -> str:
        return hmac.digest(self._key, text.encode(), "sha256").hex()


def without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns a value as JSON, its tensors moved to `tensors`.

    Raises:
        ValueError: If it holds what JSON does not.
    """
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[_plain(k), without_tensors(v, tensors)] for k, v in value.items()]
        return {"items": items}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [without_tensors(v, tensors) for v in value]}
    return _plain(value)


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(
        f"Expected a state of tensors, numbers and words, got {type(value).__name__}: it cannot be "
        "stored in a checkpoint. Use an optimizer with a plain state."
    )


def _with_tensors(value: Any, tensors: Mapping[str, Tensor | Stored]) -> Any:
    """The inverse of `without_tensors`."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "items":
        return {key: _with_tensors(v, tensors) for key, v in inner}
    return (tuple if kind == "tuple" else list)(_with_tensors(v, tensors) for v in inner)
