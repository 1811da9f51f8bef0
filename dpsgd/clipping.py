"""Clipping policies: from per-sample norms to the weights of the sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Clipping(ABC):
    """Turns norms [B, K] into weights [B, K] so that a sample moves the sum by a bounded amount."""

    @property
    @abstractmethod
    def sensitivity(self) -> float:
        """Bound on the L2 norm by which one sample moves the weighted sum (add/remove)."""

    @abstractmethod
    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Returns the partition of the parameter names whose norms are clipped together."""

    @abstractmethod
    def __call__(self, norms: Tensor) -> Tensor:
        """Returns the weights [B, K] for norms [B, K]; 0 where a norm is not finite."""


@dataclass(frozen=True)
class Flat(Clipping):
    """Clips the whole gradient: w_i = min(1, C / ||g_i||) (Abadi et al. 2016, arXiv:1607.00133).

    Guarantee: ||w_i g_i|| <= C for every sample, whatever it contains, so adding or removing one
    moves the sum by at most C in L2.

    Attributes:
        max_grad_norm: The clip norm C.
    """

    max_grad_norm: float

    def __post_init__(self) -> None:
        """Raises ValueError unless max_grad_norm is positive and of a size that float32 can add."""
        if not 1e-30 <= self.max_grad_norm <= 1e30:
            raise ValueError(f"Expected max_grad_norm in [1e-30, 1e30], got {self.max_grad_norm}.")

    @property
    def sensitivity(self) -> float:
        """C."""
        return self.max_grad_norm

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Returns one group of all names."""
        return [list(names)]

    def __call__(self, norms: Tensor) -> Tensor:
        """Returns min(1, C / norms) in the norms' precision.

        It is 0 where a norm is not finite, or so large that C / norm has lost its precision.
        """
        weights = (self.max_grad_norm / norms).clamp(max=1)
        usable = torch.isfinite(norms) & (weights >= torch.finfo(weights.dtype).tiny)
        return torch.where(usable, weights, torch.zeros_like(weights))
