"""Normalisation layers: y = x_hat * weight + bias, x_hat normalised within each sample."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.rules.registry import Call, Rule, register


class LastDimensions(Rule):
    """Normalises over the last dimensions, which weight and bias are shaped as."""

    samples = ("input",)

    @abstractmethod
    def normalized(self, call: Call) -> Tensor:
        """Returns x_hat, of the shape of the input."""

    def materialize(self, call: Call, name: str) -> Tensor:
        """Returns sum_t g_it * x_hat_it, or sum_t g_it for the bias, [B, *normalized_shape]."""
        products = call.g if name == "bias" else call.g * self.normalized(call)
        between = tuple(range(1, products.dim() - len(call["normalized_shape"])))
        return products.sum(between) if between else products


@register(torch.layer_norm)
class LayerNorm(LastDimensions):
    """Layer normalisation (Ba et al. 2016, arXiv:1607.06450)."""

    weights = ("weight", "bias")

    def forward(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Tensor:
        """Returns [B, ..., *normalized_shape]."""
        return torch.layer_norm(input, normalized_shape, weight, bias, eps, cudnn_enable)

    def normalized(self, call: Call) -> Tensor:
        """Returns (x - mean) / std."""
        return F.layer_norm(call["input"], call["normalized_shape"], eps=call["eps"])


@register(torch.rms_norm)
class RMSNorm(LastDimensions):
    """Root mean square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    weights = ("weight",)

    def forward(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        """Returns [B, ..., *normalized_shape]."""
        return torch.rms_norm(input, normalized_shape, weight, eps)

    def normalized(self, call: Call) -> Tensor:
        """Returns x / rms(x)."""
        return F.rms_norm(call["input"], call["normalized_shape"], eps=call["eps"])


class Channels(Rule):
    """Normalises [B, n, channels, ...] within samples; weight and bias are [channels]."""

    weights = ("weight", "bias")
    samples = ("input",)

    @abstractmethod
    def normalized(self, call: Call, x: Tensor) -> Tensor:
        """Returns x_hat for an input [B n, channels, ...]."""

    def materialize(self, call: Call, name: str) -> Tensor:
        """Returns the sum of g_i * x_hat_i, or of g_i for the bias, over positions, [B, c]."""
        products = call.g
        if name == "weight":
            x = call["input"]
            products = call.g * self.normalized(call, x.flatten(0, 1)).view_as(x)
        return products.sum((1, *range(3, products.dim())))


@register(torch.group_norm)
class GroupNorm(Channels):
    """Group normalisation (Wu & He 2018, arXiv:1803.08494)."""

    def forward(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> Tensor:
        """Returns [B, n, channels, ...]."""
        flat = torch.group_norm(input.flatten(0, 1), num_groups, weight, bias, eps, cudnn_enabled)
        return flat.unflatten(0, input.shape[:2])

    def materialize(self, call: Call, name: str) -> Tensor:
        """Returns the gradients, of the weight by autograd's kernel: samples as channels of one."""
        if name == "bias":
            return super().materialize(call, name)
        x, g = (t.transpose(0, 1).contiguous() for t in (call["input"], call.g))
        n, size, channels = x.shape[:3]
        shape = n, size * channels, x[0, 0, 0].numel(), size * call["num_groups"]
        _, mean, scale = torch.native_group_norm(x, None, None, *shape, call["eps"])
        weight = x.new_ones(size * channels)
        backward = torch.ops.aten.native_group_norm_backward
        grads = backward(g, x, mean, scale, weight, *shape, [False, True, True])
        return grads[1].view(size, channels)

    def normalized(self, call: Call, x: Tensor) -> Tensor:
        """Returns x normalised within groups of channels."""
        return F.group_norm(x, call["num_groups"], eps=call["eps"])


@register(torch.instance_norm)
class InstanceNorm(Channels):
    """Instance normalisation (Ulyanov et al. 2016, arXiv:1607.08022)."""

    def forward(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        use_input_stats: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        """Returns [B, n, channels, ...]."""
        flat = torch.instance_norm(
            input.flatten(0, 1),
            weight,
            bias,
            running_mean,
            running_var,
            use_input_stats,
            momentum,
            eps,
            cudnn_enabled,
        )
        return flat.unflatten(0, input.shape[:2])

    def normalized(self, call: Call, x: Tensor) -> Tensor:
        """Returns x normalised by its own statistics, or by running ones where they are used."""
        own = call["use_input_stats"]
        return F.instance_norm(
            x,
            None if own else call["running_mean"],
            None if own else call["running_var"],
            use_input_stats=own,
            eps=call["eps"],
        )
