"""Tensors in files: NumPy's .npz, .safetensors, or a folder of .npy files of any size."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dpsgd.data.base import Dataset
from dpsgd.data.schema import Records, Schema


def tensors(
    path: str | Path,
    input_shape: Sequence[int],
    num_classes: int | None,
    public_size: int,
    vocab_size: int | None = None,
) -> Dataset:
    """Returns the records of a file: tensors `x` and `y`, and perhaps `x_test` and `y_test`.

    A folder with x.npy, y.npy and so on is mapped into memory instead of read: a step then reads
    the records that it draws, and there may be more of them than fit. Store them in the type that
    is used, float32, or int64 for ids and labels: any other is converted as a whole, in memory.

    Integers `users` [N] in the file say whose each training record is, for user-level sampling.

    Inputs [N, ...] may come in any shape that fits `input_shape`; they become float32, or int64 if
    they are token ids, and are not scaled. No code in the file is ever run: pickled objects are
    refused.

    Args:
        path: File ending in .npz or .safetensors, or a folder of .npy files.
        input_shape: Shape of one input.
        num_classes: Number of classes; None for regression.
        public_size: Number of training records to be used where it must be public.
        vocab_size: Number of tokens; None for inputs that are not token ids.

    Raises:
        ValueError: If the file cannot be read, lacks a tensor or does not match the declarations.
    """
    path = Path(path)
    folder = path.is_dir()
    if not folder and path.suffix not in _READERS:
        raise ValueError(
            f"Expected a file ending in {' or '.join(_READERS)}, or a folder of .npy files, got "
            f"{path.name}."
        )
    if not folder and not path.is_file():
        raise ValueError(f"Expected a file at {path}, got none.")
    try:
        loaded = _map_folder(path) if folder else _READERS[path.suffix](path)
    except _UNREADABLE as error:
        raise ValueError(
            f"Expected a complete {'.npy' if folder else path.suffix} file of plain numeric arrays "
            f"at {path}, got: {error} Write it again, without objects or strings."
        ) from error
    schema = Schema(input_shape, num_classes, vocab_size)
    train = _records(loaded, ("x", "y"), schema, path)
    has_test = "x_test" in loaded or "y_test" in loaded
    return Dataset(
        train=train,
        test=_records(loaded, ("x_test", "y_test"), schema, path) if has_test else None,
        input_shape=input_shape,
        num_classes=num_classes,
        public_size=public_size,
        vocab_size=vocab_size,
        users=loaded["users"].long() if "users" in loaded else None,
    )


def _records(
    loaded: Mapping[str, Tensor], names: tuple[str, str], schema: Schema, path: Path
) -> Records:
    missing = [name for name in names if name not in loaded]
    if missing:
        raise ValueError(
            f"Expected tensors {names[0]} and {names[1]} in {path}, got "
            f"{', '.join(sorted(loaded)) or 'none'}. Add {' and '.join(missing)}"
            f"{', or leave out the test set as a whole' if 'x_test' in names else ''}."
        )
    x, y = (loaded[name] for name in names)
    return schema.conform(x, y)


def _read_npz(path: Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(path):
        raise ValueError("an incomplete archive.")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _map_folder(path: Path) -> dict[str, Tensor]:
    """Memory-maps the .npy files of a folder; what is written to the tensors stays in memory."""
    return {
        file.stem: torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))
        for file in sorted(path.glob("*.npy"))
    }


_READERS: Mapping[str, Callable[[Path], dict[str, Tensor]]] = {
    ".npz": _read_npz,
    ".safetensors": load_file,
}
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    zipfile.BadZipFile,
    zlib.error,
    SafetensorError,
)
