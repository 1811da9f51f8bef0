"""What a bit-exact replay of a run depends on, and what must not change when a run goes on."""

from __future__ import annotations

import hashlib
import hmac
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dpsgd.data import Dataset
from dpsgd.parallel import World

_CRITICAL = (
    "privacy.", "sampler.", "clipping.", "noise.", "accountant.",
    "trainer.num_steps", "trainer.epochs", "data.public_size",
)  # fmt: skip
_FREE = (
    "run.", "logger.", "checkpoint.", "debug", "resume", "sweep.", "account.", "ledger",
    "trainer.evaluate_every", "privacy.key", "device",
)  # fmt: skip
_LIBRARIES = (
    "torch", "numpy", "opacus", "safetensors", "torchvision", "timm", "transformers", "peft",
    "einops", "scipy",
)  # fmt: skip
_VARIABLES = (
    "MKL_", "ONEDNN_", "DNNL_", "ATEN_", "OMP_", "KMP_", "GOMP_", "CUBLAS_", "CUDNN_",
    "NVIDIA_", "TORCH_", "OPENBLAS_",
)  # fmt: skip
_CHUNK_ROWS = 1 << 16
_ABSENT = "(absent)"


def settings(config: DictConfig) -> dict[str, Any]:
    """Returns every setting of a resolved configuration by its dotted name, without the key.

    Settings that change neither a weight nor the guarantee are left out; the device counts as what
    it is, not as what it was called (`conditions`).
    """
    found = dict(_leaves(OmegaConf.to_container(config, resolve=True), ""))
    return {key: found[key] for key in sorted(found) if not _is(key, _FREE)}


def critical(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that the guarantee depends on."""
    return {key: value for key, value in given.items() if _is(key, _CRITICAL)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns (name, before, now) of each entry that differs."""
    return [
        (key, _shown(before, key), _shown(now, key))
        for key in sorted(before.keys() | now.keys())
        if _shown(before, key) != _shown(now, key)
    ]


def conditions(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Returns what besides the configuration and the data decides how numbers are rounded.

    Args:
        device: Where the model is.
        processes: How many processes train it.
    """
    cpu = f"{_processor()} {torch.backends.cpu.get_cpu_capability()}"
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_VARIABLES) and not name.endswith("_NUM_THREADS")
    }
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "device": where,
        "processor": cpu,
        "processes": processes,
        "threads": torch.get_num_threads(),
        **versions(),
        **variables,
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python, of libraries and of the code."""
    libraries = {name: _version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **libraries, "code": _code()}


def agree(config: DictConfig, world: World) -> None:
    """Raises unless all processes have the same settings and versions.

    Raises:
        ValueError: With those that differ.
    """
    if world.size > 1:
        world.agree({**settings(config), **versions()}, "settings and versions")


def digest(values: Mapping[str, Any]) -> bytes:
    """Returns the SHA-256 of a mapping of plain values."""
    text = "\n".join(f"{key}={values[key]!r}" for key in sorted(values))
    return hashlib.sha256(text.encode()).digest()


def fingerprint(data: Dataset, key: bytes) -> str:
    """Returns a keyed fingerprint of the training records, which tells nothing without the key.

    One pass over the records in pieces, HMAC-SHA-256.

    Args:
        data: The records.
        key: 32 bytes, as secret as the records.
    """
    mac = hmac.new(key, digestmod="sha256")
    for tensor in (*data.train, *(() if data.users is None else (data.users,))):
        mac.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        for rows in tensor.split(_CHUNK_ROWS):
            mac.update(_bytes(rows))
    return mac.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _processor() -> str:
    """The model of the processor, by which libraries choose their kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {names[0] if names else platform.processor()}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return _ABSENT


@lru_cache(maxsize=1)
def _code() -> str:
    """SHA-256 of this package and of every loaded module that is not an installed one."""
    installed = tuple(os.path.realpath(sysconfig.get_path(n)) for n in ("stdlib", "purelib"))
    package = Path(__file__).resolve().parent
    files = set(package.rglob("*.py"))
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file.endswith(".py") and not file.startswith(installed):
            path = os.path.realpath(file)
            if not path.startswith(installed):
                files.add(Path(path))
    found = sorted(hashlib.sha256(path.read_bytes()).digest() for path in files if path.is_file())
    return hashlib.sha256(b"".join(found)).hexdigest()


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _is(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else _ABSENT
