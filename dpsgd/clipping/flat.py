"""Policies that look at the norm of the whole gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dpsgd.clipping.base import Clipping, shrinking, usable


@dataclass(frozen=True)
class Flat(Clipping):
    """Clips the whole gradient: w_i = min(1, C / ||g_i||) (Abadi et al. 2016, arXiv:1607.00133).

    Guarantee: ||w_i g_i|| <= C for every sample, whatever it contains, so adding or removing one
    moves the sum by at most C in L2.
    """

    @property
    def guarantee(self) -> str:
        """What the policy guarantees, in a sentence."""
        return "each sample's gradient is shrunk to L2 norm C at most"

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Returns one group of all names."""
        return [list(names)]

    def __call__(self, norms: Tensor) -> Tensor:
        """Returns min(1, C / norms) in the norms' precision.

        It is 0 where a norm is not finite, or so large that C / norm has lost its precision.
        """
        return shrinking(norms, self.max_grad_norm)


@dataclass(frozen=True)
class UnitNorm(Clipping):
    """Clips the gradient and scales it to norm 1 at most: w_i = min(1 / C, 1 / ||g_i||).

    De et al. (2022), arXiv:2204.13650: C then only says which gradients count as large, and a
    learning rate that suits one C suits the others. The release is that of `Flat` divided by C, and
    so is its noise: the guarantee is the same.

    Guarantee: ||w_i g_i|| <= 1 for every sample, whatever it contains.
    """

    @property
    def sensitivity(self) -> float:
        """1, whatever C is."""
        return 1.0

    @property
    def full_weight(self) -> float:
        """1 / C."""
        return 1 / self.max_grad_norm

    @property
    def guarantee(self) -> str:
        """What the policy guarantees, in a sentence."""
        return (
            "each sample's gradient is shrunk to L2 norm C at most and divided by C, so 1 at most"
        )

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Returns one group of all names."""
        return [list(names)]

    def __call__(self, norms: Tensor) -> Tensor:
        """Returns 1 / max(norms, C)."""
        return usable(1 / norms.clamp(min=self.max_grad_norm), norms)


@dataclass(frozen=True)
class Automatic(Clipping):
    """AUTO-S: w_i = C / (||g_i|| + gamma) (Bu et al. 2022, arXiv:2206.07136).

    No clip norm has to be tuned: C and the learning rate are one number. gamma keeps small
    gradients smaller than large ones.

    Guarantee: ||w_i g_i|| < C for every sample.

    Attributes:
        gamma: Stability constant, > 0.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        """Raises ValueError for a senseless C or gamma."""
        super().__post_init__()
        _check_positive("gamma", self.gamma)

    @property
    def guarantee(self) -> str:
        """What the policy guarantees, in a sentence."""
        return f"each sample's gradient is scaled to L2 norm C n / (n + {self.gamma:g}) < C"

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Returns one group of all names."""
        return [list(names)]

    def __call__(self, norms: Tensor) -> Tensor:
        """Returns C / (norms + gamma)."""
        return usable(self.max_grad_norm / (norms + self.gamma), norms)


@dataclass(frozen=True)
class Normalised(Clipping):
    """Scales every gradient to norm C: w_i = C / max(||g_i||, r).

    Das et al. (2021), arXiv:2106.07094.

    Guarantee: ||w_i g_i|| <= C for every sample; it is C wherever ||g_i|| >= r.

    Attributes:
        least_norm: r > 0: gradients below it are not enlarged further, because what is left of
            them is rounding errors.
    """

    least_norm: float = 1e-3

    def __post_init__(self) -> None:
        """Raises ValueError for a senseless C or r."""
        super().__post_init__()
        _check_positive("least_norm", self.least_norm)

    @property
    def guarantee(self) -> str:
        """What the policy guarantees, in a sentence."""
        return f"each sample's gradient is scaled to L2 norm C (less below {self.least_norm:g})"

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Returns one group of all names."""
        return [list(names)]

    def __call__(self, norms: Tensor) -> Tensor:
        """Returns C / max(norms, r)."""
        return usable(self.max_grad_norm / norms.clamp(min=self.least_norm), norms)


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"Expected a finite {name} > 0, got {value}.")
