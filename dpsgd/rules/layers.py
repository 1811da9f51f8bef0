"""How PyTorch's layers call functions: what `engines.Hooks` needs to find their rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd.rules.embedding import check_no_frequencies

FunctionCall: TypeAlias = tuple[Callable[..., Any], dict[str, Any]]
"""A function and its arguments by the names of its rule, weights being the layer's parameters."""

Layer = Callable[..., FunctionCall]
"""`layer(module, *inputs) -> FunctionCall`, the inputs those of the module's forward."""

_LAYERS: dict[type[nn.Module], Layer] = {}
_COSMETIC = {"__init__", "__repr__", "extra_repr", "reset_parameters", "__doc__", "__module__"}
_L = TypeVar("_L", bound=Layer)


def register_layer(*module_types: type[nn.Module]) -> Callable[[_L], _L]:
    """Returns a decorator that makes a function say what these modules compute.

    Raises:
        ValueError: If another module has registered one already.
    """

    def decorate(layer: _L) -> _L:
        for module_type in module_types:
            if module_type in _LAYERS and _LAYERS[module_type].__module__ != layer.__module__:
                raise ValueError(
                    f"Expected no description yet of {module_type.__name__}, got a second one."
                )
            _LAYERS[module_type] = layer
        return layer

    return decorate


def lookup_layer(module: nn.Module) -> Layer | None:
    """Returns what says which function a module calls, None if nothing does.

    A subclass inherits it as long as it overrides nothing that computes: a weight-standardised
    subclass of Conv2d, or an instance with a patched forward, has none.
    """
    overridden = set(vars(module)) & {"forward"}
    for module_type in type(module).__mro__:
        layer = _LAYERS.get(module_type)
        if layer is not None:
            computes = {n for n, v in vars(module_type).items() if callable(v)} | {"forward"}
            return None if overridden & (computes - _COSMETIC) else layer
        overridden |= set(vars(module_type))
    return None


@register_layer(nn.Linear)
def _linear(module: nn.Linear, input: Tensor) -> FunctionCall:
    return F.linear, {"input": input, "weight": module.weight, "bias": module.bias}


@register_layer(nn.Bilinear)
def _bilinear(module: nn.Bilinear, input1: Tensor, input2: Tensor) -> FunctionCall:
    inputs = {"input1": input1, "input2": input2}
    return torch.bilinear, {**inputs, "weight": module.weight, "bias": module.bias}


@register_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _conv(module: Any, input: Tensor) -> FunctionCall:
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        pads = module._reversed_padding_repeated_twice
        input, padding = F.pad(input, pads, mode=module.padding_mode), 0
    arguments = {"stride": module.stride, "padding": padding, "dilation": module.dilation}
    weights = {"weight": module.weight, "bias": module.bias}
    arguments = {**arguments, "input": input, "groups": module.groups}
    return _CONVOLUTIONS[module.weight.dim()], {**weights, **arguments}


@register_layer(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv_transpose(module: Any, input: Tensor, output_size: Any = None) -> FunctionCall:
    names = "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"
    own = {name: getattr(module, name) for name in names}
    return _TRANSPOSED[module.weight.dim()], {"input": input, **own}


@register_layer(nn.Embedding)
def _embedding(module: nn.Embedding, input: Tensor) -> FunctionCall:
    check_no_frequencies(module.scale_grad_by_freq)
    pad = -1 if module.padding_idx is None else module.padding_idx
    return torch.embedding, {"weight": module.weight, "indices": input, "padding_idx": pad}


@register_layer(nn.EmbeddingBag)
def _embedding_bag(
    module: nn.EmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> FunctionCall:
    check_no_frequencies(module.scale_grad_by_freq)
    return torch.embedding_bag, {
        "weight": module.weight,
        "indices": input,
        "offsets": torch.zeros(1, dtype=torch.long) if offsets is None else offsets,
        "mode": ("sum", "mean", "max").index(module.mode),
        "per_sample_weights": per_sample_weights,
        "include_last_offset": module.include_last_offset and offsets is not None,
        "padding_idx": module.padding_idx,
    }


@register_layer(nn.LayerNorm)
def _layer_norm(module: nn.LayerNorm, input: Tensor) -> FunctionCall:
    return torch.layer_norm, {"input": input, **_own(module, "normalized_shape", "eps")}


@register_layer(nn.RMSNorm)
def _rms_norm(module: nn.RMSNorm, x: Tensor) -> FunctionCall:
    own = {"normalized_shape": list(module.normalized_shape), "eps": module.eps}
    return torch.rms_norm, {"input": x, "weight": module.weight, **own}


@register_layer(nn.GroupNorm)
def _group_norm(module: nn.GroupNorm, input: Tensor) -> FunctionCall:
    return torch.group_norm, {"input": input, **_own(module, "num_groups", "eps")}


@register_layer(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm(module: nn.InstanceNorm1d, input: Tensor) -> FunctionCall:
    return torch.instance_norm, {
        "input": input,
        "use_input_stats": module.training or not module.track_running_stats,
        "momentum": 0.0,
        "cudnn_enabled": True,
        **_own(module, "running_mean", "running_var", "eps"),
    }


@register_layer(nn.PReLU)
def _prelu(module: nn.PReLU, input: Tensor) -> FunctionCall:
    return torch.prelu, {"input": input, "weight": module.weight}


def _own(module: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in ("weight", "bias", *names)}


_CONVOLUTIONS = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}
_TRANSPOSED = {3: torch.conv_transpose1d, 4: torch.conv_transpose2d, 5: torch.conv_transpose3d}
