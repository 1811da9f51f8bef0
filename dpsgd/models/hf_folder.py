"""A Hugging Face model as the folder that its library reads, with nothing else in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from dpsgd import durable

_PLAIN = "transformers.modeling_utils.PreTrainedModel"
_ADAPTED = "peft.peft_model.PeftModel"
_KEPT = ".safetensors", ".json"  # no card, which would be about nothing
_ADAPTERS = "adapter_config.json"
_LAST = "config.json", _ADAPTERS  # without which nothing is read


def is_huggingface(model: nn.Module) -> bool:
    """Whether a model is one of the transformers library, perhaps with adapters of peft."""
    return bool(_kinds(model) & {_PLAIN, _ADAPTED})


def save_folder(
    model: nn.Module, folder: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes config.json and model.safetensors, or those of the adapters alone.

    `from_pretrained` of the model's own class, or `PeftModel.from_pretrained(base, folder)`, reads
    them. Each file is the old one or the new one, never half of it.

    Args:
        model: A model for which `is_huggingface` holds.
        folder: The folder; it is made, its parent is there.
        weights: All weights by name where the model does not hold them, being sharded.

    Raises:
        OSError: If it cannot be written.
    """
    library: Any = model
    given = None if weights is None else dict(weights)
    with TemporaryDirectory(prefix=durable.MARK, dir=folder.parent) as scratch:
        if _ADAPTED in _kinds(model):
            library.save_pretrained(  # asks no hub for embedding layers
                scratch, save_embedding_layers=False, state_dict=given
            )
        else:
            library.save_pretrained(scratch, state_dict=given)
        folder.mkdir(exist_ok=True)
        files = [path for path in Path(scratch).iterdir() if path.suffix in _KEPT]
        for path in sorted(files, key=lambda path: (path.name in _LAST, path.name)):
            data = path.read_bytes()
            durable.write(folder / path.name, _ordered(data) if path.name == _ADAPTERS else data)


def _kinds(model: nn.Module) -> set[str]:
    """Full names of its classes: the libraries need not be there to tell."""
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}


def _ordered(data: bytes) -> bytes:
    """The adapters' configuration with its sets in order, the same bytes for the same adapters."""
    config = json.loads(data)
    config["target_modules"] = sorted(config["target_modules"])
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
