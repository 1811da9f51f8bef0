"""Policies that clip groups of parameters apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

from dpsgd.clipping.base import Clipping, shrinking


@dataclass(frozen=True)
class PerLayer(Clipping):
    """Clips the parameters of each of K modules apart, each to C_k = C / sqrt(K).

    McMahan et al. (2018), arXiv:1710.06963.

    Guarantee: sum_k C_k^2 = C^2, so a sample's whole clipped gradient has norm <= C.
    """

    @property
    def guarantee(self) -> str:
        """What the policy guarantees, in a sentence."""
        return "each layer's part of a gradient is shrunk to C / sqrt(layers), together to C"

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Returns one group per module that owns parameters."""
        layers: dict[str, list[str]] = {}
        for name in names:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        return list(layers.values())

    def __call__(self, norms: Tensor) -> Tensor:
        """Returns min(1, C_k / norms)."""
        return shrinking(norms, self.max_grad_norm / math.sqrt(norms.shape[1]))


@dataclass(frozen=True)
class Grouped(Clipping):
    """Clips named groups of parameters apart, each to its own C_k.

    Guarantee: C_k = C sqrt(share_k / sum of shares), so sum_k C_k^2 = C^2 and a sample's whole
    clipped gradient has norm <= C.

    Attributes:
        patterns: For each group the pattern of its parameters' names, such as `embedding.*`. A
            name belongs to the first group that it matches.
        shares: For each group its share of C^2; equal by default.
    """

    patterns: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for senseless groups or shares."""
        super().__post_init__()
        patterns = self.patterns
        named = isinstance(patterns, Mapping) and all(isinstance(p, str) for p in patterns.values())
        if not patterns or not named:
            raise ValueError(
                "Expected clipping.patterns with at least one group, such as "
                f"{{embedding: 'embedding.*', rest: '*'}}, got {patterns!r}."
            )
        if self.shares is not None and not isinstance(self.shares, Mapping):
            raise ValueError(f"Expected clipping.shares as {{group: share}}, got {self.shares!r}.")
        shares = self.shares or dict.fromkeys(self.patterns, 1.0)
        if shares.keys() != self.patterns.keys():
            raise ValueError(
                f"Expected one share for each group {list(self.patterns)}, got {list(shares)}."
            )
        for name, share in shares.items():
            if not (math.isfinite(share) and share > 0):
                raise ValueError(f"Expected a share > 0 for group '{name}', got {share}.")

    @property
    def guarantee(self) -> str:
        """What the policy guarantees, in a sentence."""
        return f"the parts {', '.join(self.patterns)} of a gradient are shrunk apart, together to C"

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Returns the groups in their order.

        Raises:
            ValueError: If a name matches no group, or a group matches no name.
        """
        found: dict[str, list[str]] = {group: [] for group in self.patterns}
        for name in names:
            for group, pattern in self.patterns.items():
                if fnmatchcase(name, pattern):
                    found[group].append(name)
                    break
            else:
                raise ValueError(
                    f"Expected every parameter in a clipping group, '{name}' matches none of "
                    f"{list(self.patterns.values())}. Add a group with the pattern '*'."
                )
        empty = [group for group, members in found.items() if not members]
        if empty:
            raise ValueError(
                f"Expected parameters in every clipping group, {empty} have none. The parameters "
                f"are {', '.join(names)}."
            )
        return list(found.values())

    def __call__(self, norms: Tensor) -> Tensor:
        """Returns min(1, C_k / norms)."""
        shares = [1.0 if self.shares is None else self.shares[name] for name in self.patterns]
        parts = norms.new_tensor([math.sqrt(share / sum(shares)) for share in shares])
        return shrinking(norms, self.max_grad_norm * parts)
