"""Embedding tables: rows of the weight picked by ids, as they are or reduced over bags.

Everything follows from *entries*: a row of gradient [d] for each (sample, id) that picked a row of
the table. The dense gradient [B, V, d] is formed only for who asks for it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd.rules.linear import Affine
from dpsgd.rules.registry import Call, Rule, register
from dpsgd.rules.rows import by_chunks, gram_by_parts, rounded_up, squared_norms, wide

_MODES = "sum", "mean", "max"


@dataclass(frozen=True)
class Entries:
    """What one call adds to the table.

    Attributes:
        rows: Gradients [n, d].
        samples: The sample that each belongs to, [n].
        ids: The row of the table that each belongs to, [n].
    """

    rows: Tensor
    samples: Tensor
    ids: Tensor


class Table(Rule):
    """G_i[v] = sum of the rows with sample i and id v, [B, V, d]."""

    weights = ("weight",)

    @abstractmethod
    def entries(self, call: Call) -> Entries:
        """Returns the rows that the gradients consist of, without those of the padding id."""

    def materialize(self, call: Call, name: str) -> Tensor:
        """Returns the dense gradients [B, V, d]."""
        entries, vocabulary = self.entries(call), call[name].shape[0]
        grads = entries.rows.new_zeros((call.size * vocabulary, entries.rows.shape[1]))
        grads.index_add_(0, entries.samples * vocabulary + entries.ids, entries.rows)
        return grads.view(call.size, *call[name].shape)

    def squared_norms(self, call: Call, name: str) -> Tensor:
        """Returns sum_v ||G_i[v]||^2 over the ids that sample i has, rounded up.

        Most ids occur once in a sample: only the rows of those that do not are summed.
        """
        entries, vocabulary = self.entries(call), call[name].shape[0]
        each = squared_norms(entries.rows)
        spread = each.new_zeros(call.size).index_add(0, entries.samples, each.sqrt())
        keys, order = (entries.samples * vocabulary + entries.ids).sort()
        same = keys[1:] == keys[:-1]
        if same.any():
            first = F.pad(~same, (1, 0), value=True)
            repeated = F.pad(same, (0, 1)) | ~first
            group = first[repeated].cumsum(0) - 1
            index = order[repeated]
            rows = entries.rows[index]
            sums = rows.new_zeros(int(group[-1]) + 1, rows.shape[1]).index_add_(0, group, rows)
            each = each.index_fill(0, index, 0)
            each[index[first[repeated]]] = squared_norms(sums)
        squares = each.new_zeros(call.size).index_add(0, entries.samples, each)
        return rounded_up(squares, spread, entries.rows.dtype)

    def spread(self, call: Call, name: str) -> Tensor:
        """Returns the sum of the lengths of the rows."""
        entries = self.entries(call)
        lengths = squared_norms(entries.rows).sqrt()
        return lengths.new_zeros(call.size).index_add(0, entries.samples, lengths)

    def weighted_sum(self, call: Call, name: str, weights: Tensor) -> Tensor:
        """Returns the sum of all rows, each times its sample's weight, by id, [V, d]."""
        total = call.g.new_empty(call[name].shape)
        self.add_weighted_sum(call, name, weights, total, 0.0)
        return total

    def dots(self, call: Call, name: str, direction: Tensor) -> Tensor:
        """Returns the sum of the products of each row with that of its id."""
        entries = self.entries(call)
        picked = direction[:, None].flatten(1)[entries.ids]
        products = (entries.rows * picked).sum(1, dtype=wide(call.g))
        return products.new_zeros(call.size).index_add(0, entries.samples, products)

    def gram(self, call: Call, name: str) -> Tensor:
        """Forms the gradients of the ids that occur, some features at a time."""
        entries = self.entries(call)
        seen, ids = entries.ids.unique(return_inverse=True)
        keys = entries.samples * len(seen) + ids

        def formed(features: slice) -> Tensor:
            rows = entries.rows[:, features]
            grads = rows.new_zeros(call.size * len(seen), rows.shape[1]).index_add_(0, keys, rows)
            return grads.unflatten(0, (call.size, len(seen)))

        size = call.size * len(seen) * entries.rows.element_size()
        return gram_by_parts(entries.rows.shape[1], size, formed)

    def add_weighted_sum(
        self, call: Call, name: str, weights: Tensor, out: Tensor, beta: float
    ) -> None:
        """Adds each row to that of its id."""
        entries = self.entries(call)
        rows = entries.rows * weights.to(entries.rows.dtype)[entries.samples, None]
        if beta == 0:
            out.zero_()
        total = out.view(len(out), -1) if out.is_contiguous() else torch.zeros_like(out).flatten(1)
        total.index_add_(0, entries.ids, rows.to(out.dtype))
        if not out.is_contiguous():
            out.add_(total.view(out.shape))


@register(torch.embedding)
class Embedding(Table):
    """y_t = W[id_t]."""

    samples = ("indices",)

    def forward(
        self,
        weight: Tensor,
        indices: Tensor,
        padding_idx: int = -1,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        """Returns [B, ..., d].

        Raises:
            ValueError: If the gradient is scaled by id frequencies, which couple the samples.
        """
        check_no_frequencies(scale_grad_by_freq)
        return torch.embedding(weight, indices, padding_idx, False, False)

    def entries(self, call: Call) -> Entries:
        """One row per position."""
        ids = call["indices"][:, None].flatten(1)
        rows = call.g.reshape(ids.numel(), call["weight"].shape[1])
        if call["padding_idx"] >= 0:
            rows = rows.masked_fill((ids == call["padding_idx"]).view(-1, 1), 0)
        samples = torch.arange(call.size, device=ids.device).repeat_interleave(ids.shape[1])
        return Entries(rows, samples, ids.reshape(-1).long())

    def merge(self, calls: Sequence[Call]) -> Call | None:
        """Returns the calls in a row: their positions follow each other."""
        if len({call["padding_idx"] for call in calls}) > 1:
            return None
        ids = [call["indices"][:, None].flatten(1) for call in calls]
        g = [c.g.reshape(*i.shape, c["weight"].shape[1]) for c, i in zip(calls, ids)]
        arguments = {**calls[0].arguments, "indices": torch.cat(ids, 1)}
        return replace(calls[0], arguments=arguments, g=torch.cat(g, 1))

    def cross(self, call: Call, name: str, rule: Rule, other: Call, argument: str) -> Tensor | None:
        """Returns sum_ts (e_t . a_s) G_s[id_t] where the other is a linear head with this weight.

        The gradients are sum_t onehot(id_t) e_t^T here and sum_s G_s a_s^T there.
        """
        if not isinstance(rule, Affine) or argument != rule.weights[0] or rule.transposed:
            return None
        entries = self.entries(call)
        width = entries.rows.shape[1]
        e = entries.rows.view(call.size, -1, width)
        ids = entries.ids.view(call.size, -1)
        a, g = rule.operands(other)

        def inner(rows: slice) -> Tensor:
            picked = g[rows].gather(2, ids[rows, None].expand(-1, g.shape[1], -1))
            return picked.mul_(torch.bmm(a[rows], e[rows].mT)).sum((1, 2), dtype=torch.float64)

        return by_chunks(call.size, 2 * a.shape[1] * ids.shape[1] * a.element_size(), inner)


class Picked(Table):
    """Rows of a weight [V, ...] picked by ids: `w[ids]`, `w.index_select(0, ids)`."""

    def entries(self, call: Call) -> Entries:
        """One row per id."""
        ids = call[self.samples[0]][:, None].flatten(1)
        rows = call.g.reshape(ids.numel(), math.prod(call[self.weights[0]].shape[1:]))
        samples = torch.arange(call.size, device=ids.device).repeat_interleave(ids.shape[1])
        return Entries(rows, samples, self.wrapped(call).reshape(-1))

    def wrapped(self, call: Call) -> Tensor:
        """Returns the ids with those that count from the end counted from the start."""
        ids = call[self.samples[0]].long()
        return torch.where(ids < 0, ids + call[self.weights[0]].shape[0], ids)


@register(torch.Tensor.__getitem__)
class Indexed(Picked):
    """y_t = w[id_t], one tensor of ids as the index."""

    weights = ("input",)
    samples = ("index",)

    def accepts(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the index holds whole numbers, not a mask."""
        kind = arguments["index"].dtype
        return kind in (torch.int64, torch.int32, torch.int16, torch.int8)

    def forward(self, input: Tensor, index: Tensor) -> Tensor:
        """Returns [B, *ids, ...]."""
        return input[index]


@register(torch.index_select, torch.Tensor.index_select)
class Selected(Picked):
    """y_t = w[id_t] by index_select."""

    weights = ("input",)
    samples = ("index",)

    def accepts(self, arguments: Mapping[str, Any]) -> bool:
        """Whether it picks along the first dimension."""
        return arguments["dim"] == 0 and arguments["index"].dim() == 1

    def forward(self, input: Tensor, dim: int, index: Tensor) -> Tensor:
        """Returns [B, ids, ...]."""
        return input[index]


@register(torch.embedding_bag)
class EmbeddingBag(Table):
    """Rows of the table, summed, averaged or their maximum per bag; ids are in one row.

    Samples either have ids [B, length] that `offsets` [bags] cuts into bags in the same way for
    each, or one bag each of a length of its own: ids [n], offsets [B].
    """

    samples = ("indices", "per_sample_weights")

    def forward(
        self,
        weight: Tensor,
        indices: Tensor,
        offsets: Tensor,
        scale_grad_by_freq: bool = False,
        mode: int = 0,
        sparse: bool = False,
        per_sample_weights: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Returns the bags [B, bags, d], and by-products that have no gradient.

        Raises:
            ValueError: If the gradient is scaled by id frequencies, which couple the samples.
        """
        check_no_frequencies(scale_grad_by_freq)
        starts = _starts(offsets, include_last_offset)
        every = _for_each_sample(indices, starts)
        shares = None if per_sample_weights is None else per_sample_weights.reshape(-1)
        out, *rest = torch.embedding_bag(
            weight, indices.reshape(-1), every, False, mode, False, shares, False, padding_idx
        )
        shape = len(indices), len(starts)
        return out.unflatten(0, shape), *(r.new_zeros(shape) for r in rest)

    def entries(self, call: Call) -> Entries:
        """One row per id: its share of the gradient of its bag."""
        ids, bags, starts = self._bags(call)
        g = call.g.reshape(-1, call.g.shape[-1])
        samples = torch.div(bags, len(g) // call.size, rounding_mode="floor")
        if _MODES[call["mode"]] == "max":
            return self._winners(call, ids, starts, g)
        shares = torch.ones(len(ids), dtype=g.dtype, device=g.device)
        if call["per_sample_weights"] is not None:
            shares = call["per_sample_weights"].reshape(-1).to(g.dtype)
        if call["padding_idx"] is not None:
            shares = shares.masked_fill(ids == call["padding_idx"], 0)
        if _MODES[call["mode"]] == "mean":
            counts = g.new_zeros(len(g)).index_add_(0, bags, shares)
            shares = shares / counts.clamp(min=1)[bags]
        return Entries(g[bags] * shares[:, None], samples, ids)

    def _bags(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """All ids, the bag that each belongs to, and where the bags start."""
        ids, starts = call["indices"], _starts(call["offsets"], call["include_last_offset"])
        if "indices" in call.samples:
            starts = _for_each_sample(ids.flatten(1), starts)
        ids = ids.reshape(-1)
        where = torch.arange(len(ids), device=ids.device, dtype=starts.dtype)
        return ids.long(), torch.searchsorted(starts, where, right=True) - 1, starts

    def _winners(self, call: Call, ids: Tensor, starts: Tensor, g: Tensor) -> Entries:
        """The kernel says which id won each feature of each bag; an empty bag has no winner."""
        with torch.no_grad():
            _, _, lengths, winners = torch.embedding_bag(
                call["weight"], ids, starts, False, 2, False, None, False, call["padding_idx"]
            )
        g = g.masked_fill((lengths == 0)[:, None], 0)
        bags, width = g.shape
        rows = torch.diag_embed(g).view(bags * width, width)  # one row per (bag, feature)
        samples = torch.arange(bags, device=g.device) // (bags // call.size)
        won = winners.reshape(-1).long().clamp(min=0)
        return Entries(rows, samples.repeat_interleave(width), won)


def check_no_frequencies(scale_grad_by_freq: bool) -> None:
    """Raises if a table's gradient depends on the frequencies of ids within the batch.

    Raises:
        ValueError: If it does.
    """
    if scale_grad_by_freq:
        raise ValueError(
            "Expected an embedding with scale_grad_by_freq=False: frequencies within the batch "
            "make one sample's gradient depend on the others."
        )


def _starts(offsets: Tensor, include_last: bool) -> Tensor:
    return (offsets[:-1] if include_last else offsets).contiguous()


def _for_each_sample(ids: Tensor, starts: Tensor) -> Tensor:
    """Offsets [B bags] into the ids [B, length] in one row, from offsets [bags] of each sample."""
    first = torch.arange(len(ids), device=ids.device, dtype=starts.dtype) * ids.shape[1]
    return (first[:, None] + starts).reshape(-1)
