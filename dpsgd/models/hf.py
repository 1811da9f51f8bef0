"""Models of Hugging Face's transformers as they come, whole or with LoRA adapters of peft.

A built model is what the library made: `generate`, `save_pretrained` and the names of parameters
are its own. It returns an output with `logits`, which the losses of this package take.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from dpsgd.models.arguments import positive
from dpsgd.models.attention import agree_on_padding, check_causal, ignore_padding
from dpsgd.models.lora import Lora, with_adapters
from dpsgd.optional import transformers

_HEADS = {
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}
_SPECIAL = "bos_token_id", "eos_token_id", "pad_token_id"


def huggingface(
    head: str,
    input_shape: Sequence[int],
    num_classes: int | None,
    vocab_size: int | None,
    type: str | None = None,
    config: Mapping[str, Any] | None = None,
    path: str | None = None,
    lora: Mapping[str, Any] | None = None,
    padding: int | None = None,
) -> nn.Module:
    """Returns a model of the transformers library, new or from a local directory.

    Attention is the library's own (`sdpa` where a model has it), which the ghost engine runs
    exactly; dropout is what the model's configuration says. The key-value cache is off in training,
    where it would only take memory; `generate` uses it all the same. Nothing is downloaded, and no
    code or pickle of the directory is run.

    A classifier of sequences attends to no padding on the right: called without an attention mask,
    it takes token ids equal to its `pad_token_id` for padding.

    Args:
        head: `causal_lm` (with `loss=causal_lm`), `sequence_classification` of token ids or
            `image_classification` (with `loss=cross_entropy`).
        input_shape: Shape of one input; [T] for tokens.
        num_classes: Number of classes, the width of a classifier; None for regression.
        vocab_size: Number of tokens; None for images.
        type: The kind of a new model, the library's `model_type`: gpt2, llama, bert, vit, ...
        config: Fields of its configuration other than the library's defaults. With `path`: fields
            that differ from those of the directory, dropout for example.
        path: A directory written by `save_pretrained`, to start from its weights.
        lora: Trains adapters instead of all weights, see `Lora`; None trains all.
        padding: The token id of the data's padding, for a classifier; None takes the model's own.

    Raises:
        ValueError: If a library is not installed, there is no such head, type, field or directory,
            or the model does not fit the declared data.
    """
    if head not in _HEADS:
        raise ValueError(f"Expected head to be one of {', '.join(_HEADS)}, got {head}.")
    if type is None and path is None:
        raise ValueError(
            "Expected model.type=gpt2 or another kind of model, or model.path=DIRECTORY of one to "
            "start from, got neither."
        )
    adapters = None if lora is None else Lora.of(lora)
    library = transformers()
    if head != "sequence_classification":
        padding = None
    declared = _labels(head, num_classes) | _tokens(head, vocab_size)
    if path is None:
        padded = {} if padding is None else {"pad_token_id": padding}
        settings = _new_settings(library, str(type), declared | padded, config or {})
    else:
        settings = _stored_settings(library, type, path, config or {})
        if "num_labels" in declared:
            settings.num_labels = declared["num_labels"]
    _check_sizes(settings, input_shape, vocab_size)
    _suit(settings, head)
    if head == "sequence_classification":
        agree_on_padding(settings, padding)
    auto = getattr(library, _HEADS[head])
    model = _new(auto, settings, head) if path is None else _stored(auto, settings, path, head)
    if "use_cache" in _fields(settings):
        model.config.use_cache = False
    if head == "causal_lm":
        check_causal(model)
    if head == "sequence_classification":
        ignore_padding(model)
    return (model if adapters is None else with_adapters(model, adapters, head)).train()


def _labels(head: str, num_classes: int | None) -> dict[str, Any]:
    """The fields of a classifier that the declared data decides."""
    if head == "causal_lm":
        return {}
    return {"num_labels": 1 if num_classes is None else positive("num_classes", num_classes)}


def _tokens(head: str, vocab_size: int | None) -> dict[str, Any]:
    """The fields of a model of token ids that the declared data decides."""
    if head == "image_classification":
        return {}
    if vocab_size is None:
        raise ValueError(
            "Expected data with a vocab_size, token ids, for a language model, got none. "
            "Declare data.vocab_size, or choose head=image_classification."
        )
    return {"vocab_size": positive("vocab_size", vocab_size)}


def _new_settings(
    library: ModuleType, kind: str, declared: Mapping[str, Any], given: Mapping[str, Any]
) -> Any:
    """The configuration of a new model; special tokens outside the vocabulary are none."""
    known = library.CONFIG_MAPPING
    if kind not in known:
        raise ValueError(
            f"Expected model.type to be a model_type of transformers, got "
            f"{kind!r}.{_near(kind, known.keys())}"
        )
    defaults = known[kind]()
    _check_fields(defaults, given)
    values = {**declared, **given}
    special = {name: defaults.to_dict().get(name) for name in _SPECIAL}
    size = values.get("vocab_size")
    if isinstance(size, int):
        outside = {name: None for name, at in special.items() if isinstance(at, int) and at >= size}
        values = {**outside, **values}
    try:
        return known[kind](**values)
    except Exception as error:  # whatever the library says of values that make no sense
        raise _refused(f"the configuration of a {kind}", error) from error


def _stored_settings(
    library: ModuleType, kind: str | None, path: str, given: Mapping[str, Any]
) -> Any:
    """The configuration in a directory, with some fields changed."""
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"Expected a directory with a config.json, as save_pretrained writes it, at "
            f"model.path='{path}', got none. Nothing is downloaded: fetch the model first."
        )
    try:
        settings = library.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _refused(f"a model of model.path='{path}'", error) from error
    if kind is not None and kind != settings.model_type:
        raise ValueError(
            f"Expected a {kind} in model.path='{path}', got a {settings.model_type}. Set "
            "model.type to that, or to null."
        )
    _check_fields(settings, given)
    for name, value in given.items():
        setattr(settings, name, value)
    return settings


def _fields(settings: Any) -> set[str]:
    return {*settings.to_dict(), *settings.attribute_map}


def _check_fields(settings: Any, given: Mapping[str, Any]) -> None:
    known = _fields(settings)
    for name in given:
        if name not in known:
            raise ValueError(
                f"A {settings.model_type} takes no '{name}' (model.config.{name})."
                f"{_near(name, known)}"
            )


def _near(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    return f" It takes {', '.join(sorted(known))}." if len(known) < 100 else ""


def _check_sizes(settings: Any, input_shape: Sequence[int], vocab_size: int | None) -> None:
    found = settings.to_dict() | {name: getattr(settings, name) for name in settings.attribute_map}
    size, positions = found.get("vocab_size"), found.get("max_position_embeddings")
    if vocab_size is not None and isinstance(size, int) and size < vocab_size:
        raise ValueError(
            f"Expected a model with at least the {vocab_size} tokens of data.vocab_size, got "
            f"{size}. Use data of the model's own tokenizer."
        )
    if vocab_size is not None and isinstance(positions, int) and positions < input_shape[0]:
        raise ValueError(
            f"Expected a model with at least {input_shape[0]} positions, the length of "
            f"data.input_shape, got {positions}. Use shorter sequences."
        )


def _suit(settings: Any, head: str) -> None:
    """Makes a decoder of what is an encoder by default."""
    if head == "causal_lm" and settings.to_dict().get("is_decoder") is False:
        settings.is_decoder = True


def _new(auto: Any, settings: Any, head: str) -> Any:
    try:
        return auto.from_config(settings)
    except Exception as error:  # whatever the library says of fields that do not go together
        raise _refused(f"a {settings.model_type} with head={head}", error) from error


def _stored(auto: Any, settings: Any, path: str, head: str) -> Any:
    try:
        model, info = auto.from_pretrained(
            Path(path).expanduser(),
            config=settings,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise _refused(f"a model with head={head} in model.path='{path}'", error) from error
    inner = f"{model.base_model_prefix}."
    lost = [name for name in info["missing_keys"] if head == "causal_lm" or name.startswith(inner)]
    lost += [name for name in info["unexpected_keys"] if name.startswith(inner)]
    if lost:
        raise ValueError(
            f"Expected the weights in model.path='{path}' to be those of this "
            f"{settings.model_type} with head={head}, but {', '.join(sorted(lost)[:3])} and so on "
            "are not in both. Leave fields that change shapes out of model.config."
        )
    return model


def _refused(wanted: str, error: Exception) -> ValueError:
    words = " ".join(str(error).split())
    return ValueError(f"Cannot make {wanted}: {_kind_of(error)}{words}")


def _kind_of(error: Exception) -> str:
    """The name of an error that its words need to be understood, a missing key for example."""
    return "" if isinstance(error, (ValueError, OSError)) else f"{error.__class__.__name__}: "
