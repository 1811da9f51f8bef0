"""Norms and sums of rows: per-sample gradients that are formed, or products that need not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20
"""How much memory gradients that are formed in passing may take at a time."""

GRAM_SHARE = 1.0
"""Gram matrices are taken where 2 T^2 <= GRAM_SHARE * p * d, that is where they are smaller."""

_PIECE = 4096
_TINY = 1e-20
_DOUBT = 1e-3


def squared_norms(grads: Tensor) -> Tensor:
    """Returns the squared L2 norm [B] of each row of [B, *shape], in float64 where there is any.

    Short pieces are summed in the gradients' precision (float32 at least), the pieces in float64:
    no long float32 sum loses small terms. Rows that overflow or vanish so are taken in float64
    throughout: a norm is never under-estimated, and 1e30 is not infinite.
    """
    wide = _wide(grads)
    rows = grads[:, None].flatten(1)
    whole = rows.shape[1] // _PIECE * _PIECE
    dtype = torch.promote_types(grads.dtype, torch.float32)
    squares = torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=dtype).to(wide).square()
    if whole:
        pieces = rows[:, :whole].unflatten(1, (-1, _PIECE))
        norms = torch.linalg.vector_norm(pieces, dim=2, dtype=dtype).to(wide)
        squares = squares + norms.square().sum(1)
    if dtype != wide:
        unsure = ~torch.isfinite(squares) | (squares < _TINY)
        if unsure.any():
            exact = torch.linalg.vector_norm(rows[unsure], dim=1, dtype=wide).square()
            squares = squares.masked_scatter(unsure, exact)
    return squares


def weighted_rows(weights: Tensor, grads: Tensor, usable: Tensor | None = None) -> Tensor:
    """Returns sum_i w_i g_i over the usable rows of [B, *shape] (all), in float32 or better."""
    dtype = torch.promote_types(grads.dtype, torch.float32)
    if usable is not None:
        weights, grads = weights[usable], grads[usable]
    flat = weights.to(dtype) @ grads[:, None].flatten(1).to(dtype)
    return flat.view(grads.shape[1:])


def chunks(size: int, bytes_per_row: int) -> Iterator[slice]:
    """Yields slices of `size` rows that together hold at most some 32 MiB, one row at least."""
    step = max(1, CHUNK_BYTES // max(1, bytes_per_row))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def by_chunks(size: int, bytes_per_row: int, norms: Callable[[slice], Tensor]) -> Tensor:
    """Returns [size], `norms` of one chunk of rows after the other."""
    return torch.cat([norms(rows) for rows in chunks(size, bytes_per_row)])


def product_norms(a: Tensor, g: Tensor) -> Tensor:
    """Returns ||sum_t g_t a_t^T||_F^2 for each row of a [B, T, d] and g [B, T, p], [B].

    For T = 1 it is ||a||^2 ||g||^2. For few positions it is the sum over the entrywise product of
    the Gram matrices a a^T and g g^T [T, T] (Goodfellow 2015, arXiv:1510.01799; Li et al. 2021,
    arXiv:2110.05679), which never forms the product; for many it is formed, some rows at a time.

    The result is rounded up: the bound 2 eps (sum_t ||a_t|| ||g_t||)^2 on the rounding error of a
    sum that may cancel is added to it, and where that is more than a thousandth of it, the product
    is formed after all, whose error is only the square root of that.
    """
    positions, d, p = a.shape[1], a.shape[2], g.shape[2]
    if positions == 1:
        return squared_norms(a) * squared_norms(g)
    reach = spread(a, g)
    if 2 * positions**2 > GRAM_SHARE * d * p:
        return _formed_norms(a, g, reach)
    squares = by_chunks(
        len(a), 2 * positions**2 * a.element_size(), lambda rows: _gram_norms(a[rows], g[rows])
    )
    error = 2 * torch.finfo(a.dtype).eps * reach.square()
    doubtful = ~(error <= _DOUBT * squares) | ~torch.isfinite(squares) | (squares < _TINY)
    squares = squares + error
    if doubtful.any():
        formed = _formed_norms(a[doubtful], g[doubtful], reach[doubtful])
        squares = squares.masked_scatter(doubtful, formed)
    return squares


def rounded_up(squares: Tensor, reach: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns (sqrt(squares) + 2 eps reach)^2: no less than the norm of the same sum taken anew.

    Args:
        squares: Squared norms of sums [B].
        reach: The sums of the norms of their terms [B].
        dtype: The precision the sums were taken in.
    """
    return (squares.sqrt() + 2 * torch.finfo(dtype).eps * reach).square()


def _formed_norms(a: Tensor, g: Tensor, reach: Tensor) -> Tensor:
    size = a.shape[2] * g.shape[2] * a.element_size()
    squares = by_chunks(
        len(a), size, lambda rows: squared_norms(torch.bmm(g[rows].transpose(1, 2), a[rows]))
    )
    return rounded_up(squares, reach, a.dtype)


def _gram_norms(a: Tensor, g: Tensor) -> Tensor:
    grams = torch.bmm(a, a.transpose(1, 2)).mul_(torch.bmm(g, g.transpose(1, 2)))
    return grams.sum((1, 2), dtype=_wide(a))


def spread(a: Tensor, g: Tensor) -> Tensor:
    """Returns sum_t ||a_t|| ||g_t||, [B]: what a sum of products may lose to rounding, over eps."""
    products = squared_norms(a.flatten(0, 1)) * squared_norms(g.flatten(0, 1))
    return products.sqrt().view(a.shape[:2]).sum(1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64
