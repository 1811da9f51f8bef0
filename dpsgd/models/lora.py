"""Low-rank adapters: Hu et al. (2021), arXiv:2106.09685, by the peft library."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from dpsgd.optional import peft

_TASKS = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}


@dataclass(frozen=True)
class Lora:
    """Adapters W + alpha / r B A on weights W that stay as they are; B starts at zero.

    Under differential privacy the noise then falls on few coordinates (Yu et al. (2022),
    arXiv:2110.06500).

    Attributes:
        r: Rank of an adapter.
        alpha: Its weight, times r.
        dropout: Probability of dropping each input of an adapter.
        target_modules: Names of the modules that get one, such as c_attn; None lets peft choose by
            the kind of model. An embedding and a head that share one weight get one each, so they
            cannot be merged into it afterwards.

    Raises:
        ValueError: If a value is out of range.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"Expected lora.r to be a positive integer, got {self.r!r}.")
        if not isinstance(self.alpha, (int, float)) or not self.alpha > 0:
            raise ValueError(f"Expected lora.alpha > 0, got {self.alpha!r}.")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"Expected 0 <= lora.dropout < 1, got {self.dropout!r}.")
        names = self.target_modules
        if names is not None and (isinstance(names, str) or not names):
            raise ValueError(
                f"Expected lora.target_modules to be a list of module names, got {names!r}."
            )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Lora:
        """Returns the adapters that a mapping of attributes describes.

        Raises:
            ValueError: If there is no such attribute, or a value is out of range.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"Expected model.lora={{r: 8, alpha: 16}} or null, got {given!r}.")
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"There is no lora.{name}.{hint} It takes {', '.join(known)}.")
        return cls(**given)


def with_adapters(model: nn.Module, lora: Lora, head: str) -> nn.Module:
    """Returns the model with adapters, only they (and a classifier's new head) being trainable.

    Args:
        model: A model of the transformers library; its modules are replaced in place.
        lora: The adapters.
        head: The word for the model's head.

    Raises:
        ValueError: If peft is not installed, or the model has no such module.
    """
    library = peft()
    _check_targets(model, lora.target_modules or ())
    config = library.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=None if lora.target_modules is None else list(lora.target_modules),
        task_type=_TASKS.get(head),
        modules_to_save=["classifier"] if head == "image_classification" else None,
    )
    try:
        with warnings.catch_warnings():  # of what is said above, and of what peft mends
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries
            return library.get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(
            f"Cannot put adapters into this model: {error} Set lora.target_modules to some of "
            f"{', '.join(_suitable(model))}."
        ) from error


def _check_targets(model: nn.Module, names: Sequence[str]) -> None:
    suitable, paths = _suitable(model), [path for path, _ in model.named_modules()]
    for name in names:
        there = any(path == name or path.endswith(f".{name}") for path in paths)
        if not there or name.rpartition(".")[2] not in suitable:
            raise ValueError(
                "Expected lora.target_modules to be modules with a weight matrix, got "
                f"'{name}'. The model has {', '.join(suitable)}."
            )


def _suitable(model: nn.Module) -> list[str]:
    """The names of the modules that have one weight matrix, each once."""
    found: dict[str, None] = {}
    for path, module in model.named_modules():
        weights = dict(module.named_parameters(recurse=False))
        if "weight" in weights and weights["weight"].dim() == 2:
            found[path.rpartition(".")[2]] = None
    return list(found)
