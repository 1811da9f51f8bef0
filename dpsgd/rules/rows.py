"""Norms and sums of rows: per-sample gradients that are formed, or products that need not be."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 4 << 20
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
    rows, dtype = _in_memory_order(grads)[0], torch.promote_types(grads.dtype, torch.float32)
    whole = rows.shape[1] // _PIECE * _PIECE
    exact = wide(grads)
    if whole == 0:
        squares = torch.linalg.vector_norm(rows, dim=1, dtype=dtype).to(exact).square()
    else:
        pieces = rows[:, :whole].unflatten(1, (-1, _PIECE))
        squares = torch.linalg.vector_norm(pieces, dim=2, dtype=dtype).to(exact).square().sum(1)
        if whole < rows.shape[1]:
            rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=dtype)
            squares += rest.to(exact).square()
    if dtype != exact and not _within(squares, _TINY):
        unsure = ~(torch.isfinite(squares) & (squares >= _TINY))
        again = torch.linalg.vector_norm(rows[unsure], dim=1, dtype=exact).square()
        squares = squares.masked_scatter(unsure, again)
    return squares


def _within(values: Tensor, least: float) -> bool:
    """Whether all values are finite and at least that large."""
    if values.numel() == 0:
        return True
    low, high = values.aminmax()
    return float(low) >= least and float(high) < math.inf  # false for NaN


def dots(grads: Tensor, direction: Tensor) -> Tensor:
    """Returns <g_i, v> of each row of [B, *shape] with a direction of that shape, [B]."""
    dtype = torch.promote_types(grads.dtype, torch.float32)
    rows = grads[:, None].flatten(1).to(dtype)
    return (rows @ direction.flatten().to(dtype)).to(wide(grads))


def gram(grads: Tensor) -> Tensor:
    """Returns <g_i, g_j> of all pairs of rows of [B, *shape], [B, B]."""
    rows = _in_memory_order(grads)[0]
    rows = rows.to(torch.promote_types(grads.dtype, torch.float32))
    return (rows @ rows.T).to(wide(grads))


def gram_by_parts(width: int, bytes_per_feature: int, form: Callable[[slice], Tensor]) -> Tensor:
    """Returns the Gram matrix [B, B] of gradients that are formed some features at a time.

    Args:
        width: The number of features.
        bytes_per_feature: How much memory one of them takes, for all samples.
        form: Returns the gradients [B, ...] of some features.
    """
    features = list(chunks(width, bytes_per_feature)) or [slice(0, 0)]
    return functools.reduce(torch.Tensor.add_, (gram(form(some)) for some in features))


def weighted_rows(weights: Tensor, grads: Tensor) -> Tensor:
    """Returns sum_i w_i g_i over the rows of [B, *shape], in float32 or better."""
    dtype = torch.promote_types(grads.dtype, torch.float32)
    out = torch.empty(grads.shape[1:], dtype=dtype, device=grads.device)
    add_weighted_rows(out, weights, grads, None, 0.0)
    return out


def add_weighted_rows(
    out: Tensor, weights: Tensor, grads: Tensor, usable: Tensor | None, beta: float
) -> None:
    """Makes `out` beta * out + sum_i w_i g_i over the usable rows of [B, *shape] (all)."""
    dtype = torch.promote_types(grads.dtype, torch.float32)
    if usable is not None:
        weights, grads = weights[usable], grads[usable]
    rows, order = _in_memory_order(grads)
    weights = weights.to(dtype)
    if order == sorted(order) and out.is_contiguous():
        add_product(out.view(-1), rows.T.to(dtype), weights, beta)
        return
    total = (weights @ rows.to(dtype)).view([grads.shape[1:][dim] for dim in order])
    total = total.permute([order.index(dim) for dim in range(len(order))])
    if beta:
        out.add_(total)
    else:
        out.copy_(total)


def add_product(out: Tensor, left: Tensor, right: Tensor, beta: float) -> None:
    """Makes `out` beta * out + left @ right, in the product itself where the precision allows."""
    if out.dtype != left.dtype:
        product = left @ right
        if beta:
            out.add_(product)
        else:
            out.copy_(product)
    elif right.dim() == 1:
        torch.addmv(out, left, right, beta=beta, out=out)
    else:
        torch.addmm(out, left, right, beta=beta, out=out)


def _in_memory_order(grads: Tensor) -> tuple[Tensor, list[int]]:
    """Returns [B, *shape] as [B, n], no copy if it is dense, and the order of the dimensions."""
    if grads.is_contiguous():
        return grads[:, None].flatten(1), list(range(grads.dim() - 1))
    strides = grads.stride()[1:]
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    return grads.permute(0, *(dim + 1 for dim in order))[:, None].flatten(1), order


def chunks(size: int, bytes_per_row: int) -> Iterator[slice]:
    """Yields slices of `size` rows that together hold at most some 4 MiB, one row at least."""
    step = max(1, CHUNK_BYTES // max(1, bytes_per_row))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def by_chunks(size: int, bytes_per_row: int, norms: Callable[[slice], Tensor]) -> Tensor:
    """Returns [size], `norms` of one chunk of rows after the other."""
    return torch.cat([norms(rows) for rows in chunks(size, bytes_per_row)])


def product_norms(a: Tensor, g: Tensor) -> Tensor:
    """Returns ||sum_t g_t a_t^T||_F^2 for each row of a [B, T, d] and g [B, T, p], [B].

    For T = 1 it is ||a||^2 ||g||^2. For few positions it is taken by Gram matrices, for many the
    product is formed, some rows at a time. It is rounded up, see `rounded_up`.
    """
    positions, d, p = a.shape[1], a.shape[2], g.shape[2]
    if positions == 1:
        return squared_norms(a) * squared_norms(g)
    few = 2 * positions**2 <= GRAM_SHARE * d * p
    return gram_norms(a, g) if few else formed_norms(a, g)


def gram_norms(a: Tensor, g: Tensor, *, halves: bool = False) -> Tensor:
    """Returns ||sum_t g_t a_t^T||_F^2 [B] as the sum over the product of Gram matrices [T, T].

    The entrywise product of a a^T and g g^T (Goodfellow 2015, arXiv:1510.01799; Li et al. 2021,
    arXiv:2110.05679): the product itself is never formed.

    Args:
        a: Inputs [B, T, d].
        g: Output gradients [B, T, p].
        halves: Whether of the two equal quarters off the diagonal only one is computed.
    """
    gram = _gram_by_halves if halves else _gram
    squares = by_chunks(
        len(a), 2 * a.shape[1] ** 2 * a.element_size(), lambda rows: gram(a[rows], g[rows])
    )
    return unless_cancelled(squares, reach(a, g), a.dtype, lambda i: formed_norms(a[i], g[i]))


def formed_norms(a: Tensor, g: Tensor) -> Tensor:
    """Returns ||sum_t g_t a_t^T||_F^2 [B], forming the product of some rows at a time."""
    size = a.shape[2] * g.shape[2] * a.element_size()
    squares = by_chunks(
        len(a), size, lambda rows: squared_norms(torch.bmm(g[rows].transpose(1, 2), a[rows]))
    )
    return rounded_up(squares, reach(a, g), a.dtype)


def pair_products(a: Tensor, g: Tensor) -> Tensor:
    """Returns <sum_t g_it a_it^T, sum_s g_js a_js^T>_F of all pairs of rows, [B, B].

    By Gram matrices of all positions [B T, B T], some rows at a time.

    Args:
        a: Inputs [B, T, d].
        g: Output gradients [B, T, p].
    """
    size, positions = a.shape[:2]

    def inner(rows: slice) -> Tensor:
        grams = [x[rows].flatten(0, 1) @ x.flatten(0, 1).T for x in (a, g)]
        products = grams[0].mul_(grams[1]).view(-1, positions, size, positions)
        return products.sum((1, 3), dtype=wide(a))

    return by_chunks(size, 2 * size * positions**2 * a.element_size(), inner)


def unless_cancelled(
    squares: Tensor, reach: Tensor, dtype: torch.dtype, formed: Callable[[Tensor], Tensor]
) -> Tensor:
    """Returns squared norms rounded up that were summed from terms of either sign.

    The bound 2 eps reach^2 on the rounding error of a sum that may cancel is added; where that is
    more than a thousandth of it, the norm is taken of the formed gradients after all, whose error
    is only the square root of that.

    Args:
        squares: Squared norms [B].
        reach: The sums of the norms of the gradients' terms, or more, [B].
        dtype: The precision that the squared norms were taken in.
        formed: Returns the squared norms of some rows, by their indices.
    """
    error = 2 * torch.finfo(dtype).eps * reach.square()
    sure = squares - error / _DOUBT
    total = squares + error
    if not _within(sure, _TINY) or not _within(total, _TINY):
        doubtful = ~((sure >= _TINY) & torch.isfinite(total))
        total = total.masked_scatter(doubtful, formed(doubtful.nonzero()[:, 0]))
    return total


def rounded_up(squares: Tensor, reach: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns (sqrt(squares) + 2 eps reach)^2: no less than the norm of the same sum taken anew.

    Args:
        squares: Squared norms of sums [B].
        reach: The sums of the norms of their terms [B].
        dtype: The precision the sums were taken in.
    """
    return (squares.sqrt() + 2 * torch.finfo(dtype).eps * reach).square()


def _gram(a: Tensor, g: Tensor) -> Tensor:
    return _inner(a, g, a, g)


def _gram_by_halves(a: Tensor, g: Tensor) -> Tensor:
    middle = a.shape[1] // 2
    first, last = (a[:, :middle], g[:, :middle]), (a[:, middle:], g[:, middle:])
    return _inner(*first, *first) + 2 * _inner(*first, *last) + _inner(*last, *last)


def _inner(a: Tensor, g: Tensor, other_a: Tensor, other_g: Tensor) -> Tensor:
    """<sum_t g_t a_t^T, sum_s g'_s a'_s^T>, [B]."""
    grams = torch.bmm(a, other_a.transpose(1, 2)).mul_(torch.bmm(g, other_g.transpose(1, 2)))
    return grams.sum((1, 2), dtype=wide(a))


def reach(a: Tensor, g: Tensor) -> Tensor:
    """Returns ||a||_F ||g||_F >= sum_t ||a_t|| ||g_t||, [B]: what a sum of products may lose."""
    return (_lengths(a) * _lengths(g)).sqrt()


def _lengths(x: Tensor) -> Tensor:
    """Squared norms of [B, ..., d] of any strides, without a copy."""
    if x.is_contiguous() or x.dim() < 3:
        return squared_norms(x)
    squares = torch.linalg.vector_norm(x, dim=-1).to(wide(x)).square().flatten(1).sum(1)
    return squares if _within(squares, _TINY) else squared_norms(x)


def spread(a: Tensor, g: Tensor) -> Tensor:
    """Returns sum_t ||a_t|| ||g_t||, [B]: what a sum of products may lose to rounding, over eps."""
    products = squared_norms(a.flatten(0, 1)) * squared_norms(g.flatten(0, 1))
    return products.sqrt().view(a.shape[:2]).sum(1)


def wide(x: Tensor) -> torch.dtype:
    """Returns float64 where the device has it, for sums that must not lose small terms."""
    return torch.float32 if x.device.type == "mps" else torch.float64
