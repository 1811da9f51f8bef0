"""The interface of a clipping policy: from per-sample norms to the weights of the sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpsgd.schedules import CONSTANT, Schedule


@dataclass(frozen=True)
class Clipping(ABC):
    """Turns norms [B, K] into weights [B, K] that bound how far a sample moves the release.

    `policy.at(step)` is the policy of a step: itself, unless C has a schedule. A policy that learns
    gives the next step's one with `policy.learned(...)`; none of them changes.

    Attributes:
        max_grad_norm: The clip norm C.
        schedule: Factors of C by step, {0: 1.0, 30: 0.5}; C stays the same by default. The noise
            follows C, so that a schedule of C costs no privacy.
    """

    max_grad_norm: float
    schedule: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError unless max_grad_norm is positive and of a size that float32 can add."""
        for factor in self._factors.factors.values():
            bound = self.max_grad_norm * factor
            if not 1e-30 <= bound <= 1e30:
                raise ValueError(f"Expected max_grad_norm in [1e-30, 1e30], got {bound}.")

    def at(self, step: int) -> Clipping:
        """Returns the policy of a step, its max_grad_norm the C of that step."""
        if self.schedule is None:
            return self
        bound = self.max_grad_norm * self._factors(step)
        return replace(self, max_grad_norm=bound, schedule=None)

    @property
    def sensitivity(self) -> float:
        """Bound on the L2 norm by which one sample moves the release (add/remove).

        The release is the weighted sum, and the statistic beside it if the policy has one.
        """
        return self.max_grad_norm

    @property
    def full_weight(self) -> float:
        """The weight of a sample whose gradient needs no clipping."""
        return 1.0

    @property
    @abstractmethod
    def guarantee(self) -> str:
        """What the policy guarantees, in a sentence."""

    @abstractmethod
    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Returns the partition of the parameter names whose norms are clipped together.

        Raises:
            ValueError: If the policy does not fit these parameters.
        """

    @abstractmethod
    def __call__(self, norms: Tensor) -> Tensor:
        """Returns the weights [B, K] for norms [B, K]; 0 for a sample with a norm not finite."""

    def statistic(self, norms: Tensor, counted: Tensor) -> Tensor | None:
        """Returns what is released beside the sum, [S], or None if the policy learns nothing.

        Args:
            norms: [B, K].
            counted: Which rows are samples, [B] of 0 and 1; the others are padding.
        """
        return None

    def learned(self, statistic: Tensor, expected_batch_size: float) -> Clipping:
        """Returns the policy of the next step, from the noised statistic of this one."""
        raise NotImplementedError(
            f"{type(self).__name__} releases a statistic, so it has to define learned()."
        )

    @property
    def _factors(self) -> Schedule:
        return CONSTANT if self.schedule is None else Schedule(self.schedule)


def shrinking(norms: Tensor, bounds: Tensor | float) -> Tensor:
    """Returns min(1, C_k / norms) [B, K], all 0 for a sample with a norm that is not usable."""
    return usable((bounds / norms).clamp(max=1), norms)


def usable(weights: Tensor, norms: Tensor) -> Tensor:
    """Returns the weights, 0 for a sample of which any is not finite or has lost its precision."""
    good = torch.isfinite(norms) & (weights >= torch.finfo(weights.dtype).tiny)
    return torch.where(good.all(1, keepdim=True), weights, torch.zeros_like(weights))
