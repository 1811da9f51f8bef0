"""The lazy per-sample gradients that every engine returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dpsgd.engines.batch import Batch
from dpsgd.engines.flat import Flat

Groups = Sequence[Sequence[str]]
"""A partition of the parameter names into K clipping groups."""


class PerSampleGrads(ABC):
    """Per-sample gradients g_i of one physical batch, formed only as far as they are asked for.

    The methods may be called in any order and any number of times until the engine's next call;
    after that they raise. No result aliases an engine's workspace (unless `out` was given).

    Everything here is sensitive: only a noised, clipped sum may be published.
    """

    def __init__(self, like: Mapping[str, Tensor], size: int) -> None:
        self._shapes = {name: x.shape for name, x in like.items()}
        self._dtypes = {n: torch.promote_types(x.dtype, torch.float32) for n, x in like.items()}
        self._size = size
        self._expired = False
        self._latest_norms: tuple[list[list[str]], Tensor] | None = None
        self._watched: list[tuple[Tensor, int]] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}(samples={self._size}, parameters={len(self._shapes)})"

    @property
    def losses(self) -> Tensor:
        """Per-sample losses [B], detached. Sensitive."""
        self._check_alive()
        return self._losses().detach().clone()

    def norms(self, groups: Groups | None = None) -> Tensor:
        """Returns the L2 norms of each sample's gradient before clipping, [B, K].

        Args:
            groups: K groups of parameter names that partition all of them; by default one group,
                the whole gradient (K = 1).

        Returns:
            ||g_i restricted to group k||_2, in float32 or better. Not finite where the gradient is
            not.
        """
        self._check_alive()
        return self._norms_of(self._groups(groups)).clone()

    def weighted_sum(
        self,
        weights: Tensor,
        groups: Groups | None = None,
        out: Mapping[str, Tensor] | None = None,
        beta: float = 1.0,
        names: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """Returns sum_i w_i g_i over the batch, a dict of tensors shaped as the parameters.

        Args:
            weights: [B], or [B, K] with one column per group. A weight of exactly 0 contributes
                exact zeros, whatever the sample's gradient is.
            groups: The K groups that the columns of `weights` belong to.
            out: Tensors, one per parameter, that become beta * out + sum; they are returned.
            beta: 1 adds to `out`; 0 forgets what it holds.
            names: The parameters whose sums are wanted, all by default.

        Raises:
            ValueError: If shapes or names do not fit, or a non-zero weight meets a gradient that is
                not finite.
        """
        self._check_alive()
        columns = self._columns(weights, groups)
        if beta not in (0, 1):
            raise ValueError(f"Expected beta to be 0 or 1, got {beta}.")
        shapes = self._chosen(names)
        if out is None:
            dtypes = {name: self._dtypes[name] for name in shapes}
            out = Flat.like(shapes, dtypes, self._losses().device).tensors(shapes)
            beta = 0
        else:
            _check_out(out, shapes)
        self._add_weighted_sum({name: columns[name] for name in shapes}, out, beta)
        return dict(out)

    def materialize(self) -> dict[str, Tensor]:
        """Returns the per-sample gradients themselves, a dict of tensors [B, *parameter.shape]."""
        self._check_alive()
        return {name: grad.clone() for name, grad in self._materialize().items()}

    def dot(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Returns <g_i, v> of each sample's gradient with one direction v, [B].

        With v the gradient of another loss it is, to first order, by how much a step along -g_i
        lowers that loss (Pruthi et al. 2020, arXiv:2002.08484). Gradients are formed for some
        samples of one parameter at a time, or not at all.

        Args:
            direction: Tensors shaped as the parameters, by name; v is 0 for those without one.

        Raises:
            ValueError: If a name or a shape does not fit.
        """
        self._check_alive()
        shapes = self._chosen(direction)
        if not shapes:
            raise ValueError("Expected a direction for at least one parameter, got none.")
        wrong = [name for name, shape in shapes.items() if direction[name].shape != shape]
        if wrong:
            raise ValueError(f"Expected a direction of the parameter's shape for {wrong}.")
        device = self._losses().device
        v = {name: direction[name].detach().to(device).contiguous() for name in shapes}
        return self._dot(v).to(self._norm_dtype())

    def gram(self, names: Collection[str] | None = None) -> Tensor:
        """Returns <g_i, g_j> of all pairs of samples, [B, B].

        Gradients are formed of one parameter at a time at most. Rows and columns of samples whose
        gradient is not finite are NaN.

        Args:
            names: The parameters that count, all by default.

        Raises:
            ValueError: If a name is unknown, or there is none.
        """
        self._check_alive()
        shapes = self._chosen(names)
        if not shapes:
            raise ValueError("Expected the name of at least one parameter, got none.")
        products = self._gram(shapes)
        bad = ~torch.isfinite(products.diagonal())
        products = products.masked_fill(bad | bad[:, None], torch.nan)
        return products.to(self._norm_dtype())

    def routes(self) -> dict[str, str]:
        """Returns for each parameter how its gradients come about, in a word or two."""
        self._check_alive()
        return self._routes()

    def expire(self) -> None:
        """Frees what the gradients hold; every later call raises. The engine calls it."""
        self._expired, self._latest_norms = True, None
        self._release()

    def watch(self, batch: Batch) -> None:
        """Makes every later call raise if a tensor of the batch is changed in place until then."""
        self._watched = [(tensor, tensor._version) for tensor in tree_leaves(batch)]

    @abstractmethod
    def _losses(self) -> Tensor: ...

    @abstractmethod
    def _squared_norms(self) -> Mapping[str, Tensor]:
        """Squared norms [B] per parameter name, accumulated in float64 where the device has it."""

    @abstractmethod
    def _add_weighted_sum(
        self, columns: Mapping[str, Tensor], out: Mapping[str, Tensor], beta: float
    ) -> None:
        """Makes out[name] beta * out[name] + the sum for one weight vector [B] per name.

        With beta = 0 whatever `out` holds is forgotten. Weights on gradients that are not finite
        are 0.
        """

    @abstractmethod
    def _materialize(self) -> Mapping[str, Tensor]: ...

    @abstractmethod
    def _dot(self, direction: Mapping[str, Tensor]) -> Tensor:
        """<g_i, v> [B], in float64 where the device has it."""

    @abstractmethod
    def _gram(self, names: Collection[str]) -> Tensor:
        """<g_i, g_j> [B, B] over some parameters, in float64 where the device has it."""

    @abstractmethod
    def _routes(self) -> dict[str, str]: ...

    @abstractmethod
    def _release(self) -> None: ...

    def _check_alive(self) -> None:
        if self._expired:
            raise ValueError(
                "These per-sample gradients ended with the engine's next call. "
                "Read norms, sums or materialize() before calling the engine again."
            )
        if any(tensor._version != version for tensor, version in self._watched):
            raise ValueError(
                "The batch was changed in place since the engine's call, and these gradients are "
                "computed from it. Expected it unchanged until they are read."
            )

    def _chosen(self, names: Collection[str] | None) -> dict[str, torch.Size]:
        """The shapes of the named parameters, in the order of all."""
        unknown = [name for name in names or () if name not in self._shapes]
        if unknown:
            raise ValueError(f"Expected names of trainable parameters, got {unknown}.")
        return {n: shape for n, shape in self._shapes.items() if names is None or n in names}

    def _groups(self, groups: Groups | None) -> list[list[str]]:
        if groups is None:
            return [list(self._shapes)]
        if any(isinstance(group, str) for group in groups):
            raise ValueError("Expected groups as sequences of parameter names, got a bare string.")
        listed = [list(group) for group in groups]
        flat = [name for group in listed for name in group]
        counts = Counter(flat)
        unknown = [name for name in flat if name not in self._shapes]
        missing = [name for name in self._shapes if name not in counts]
        twice = sorted(name for name, count in counts.items() if count > 1)
        if not all(listed):
            raise ValueError(
                "Expected at least one parameter name in each group, got an empty group."
            )
        if unknown or missing or twice:
            raise ValueError(
                "Expected groups that hold every trainable parameter once; "
                f"unknown: {unknown}, missing: {missing}, repeated: {twice}."
            )
        return listed

    def _columns(self, weights: Tensor, groups: Groups | None) -> dict[str, Tensor]:
        listed = self._groups(groups)
        norms = self._norms_of(listed)
        weights = torch.as_tensor(weights).detach().to(norms.device)
        if weights.dim() == 1:
            weights = weights[:, None].expand(-1, len(listed))
        if weights.shape != norms.shape:
            raise ValueError(
                f"Expected weights [{self._size}] or {list(norms.shape)} ({len(listed)} group(s)), "
                f"got {list(weights.shape)}."
            )
        if weights.is_complex():
            raise ValueError(f"Expected real weights, got {weights.dtype}.")
        if not torch.isfinite(weights).all():
            raise ValueError("Expected finite weights, got NaN or infinity among them.")
        if ((weights != 0) & ~torch.isfinite(norms)).any():
            raise ValueError(
                "Expected weight 0 for every sample whose gradient is not finite, got a non-zero "
                "weight. Clipping policies give such samples 0."
            )
        columns = zip(weights.unbind(1), listed, strict=True)
        return {name: column for column, group in columns for name in group}

    def _norms_of(self, groups: list[list[str]]) -> Tensor:
        """The norms [B, K] of checked groups, taken once as long as the groups stay the same."""
        if self._latest_norms is None or self._latest_norms[0] != groups:
            squares = self._squared_norms()
            totals = [torch.stack([squares[name] for name in group]).sum(0) for group in groups]
            norms = torch.stack(totals, dim=1).sqrt().to(self._norm_dtype())
            self._latest_norms = groups, norms
        return self._latest_norms[1]

    def _norm_dtype(self) -> torch.dtype:
        return torch.promote_types(self._losses().dtype, torch.float32)


def _check_out(out: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    wrong = [
        name
        for name, shape in shapes.items()
        if name not in out or out[name].shape != shape or not out[name].is_floating_point()
    ]
    if wrong:
        raise ValueError(
            f"Expected `out` to hold a floating tensor of the parameter's shape for {wrong}."
        )
