"""Embedding tables: rows of the weight picked by ids, as they are or reduced over bags."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpsgd.rules.registry import Inputs, register


@register(nn.Embedding, parameter="weight")
def embedding_weight(module: nn.Embedding, inputs: Inputs, g: Tensor) -> Tensor:
    """G_i[v] = sum of g_it over the positions t with id v, [B, V, d]; the padding id has none.

    Raises:
        ValueError: If the gradient is scaled by id frequencies, which couple the samples.
    """
    if module.scale_grad_by_freq:
        raise ValueError(
            "Expected nn.Embedding with scale_grad_by_freq=False: frequencies within the batch "
            "make one sample's gradient depend on the others."
        )
    size = g.shape[0]
    ids = inputs["input"].reshape(size, -1)
    rows = g.reshape(size, -1, g.shape[-1])
    if module.padding_idx is not None:
        rows = rows.masked_fill((ids == module.padding_idx)[..., None], 0)
    samples = torch.arange(size, device=ids.device)[:, None].expand_as(ids)
    return scatter(rows, samples, ids, (size, module.num_embeddings))


@register(nn.EmbeddingBag, parameter="weight")
def embedding_bag_weight(module: nn.EmbeddingBag, inputs: Inputs, g: Tensor) -> Tensor:
    """As for an embedding, g_i spread over the ids of bag i as the reduction says, [B, V, d].

    Raises:
        ValueError: If the gradient is scaled by id frequencies, which couple the samples.
    """
    if module.scale_grad_by_freq:
        raise ValueError(
            "Expected nn.EmbeddingBag with scale_grad_by_freq=False: frequencies within the batch "
            "make one sample's gradient depend on the others."
        )
    ids, bags = _flat_bags(module, inputs)
    shape = (g.shape[0], module.num_embeddings)
    if module.mode == "max":
        return _max_bag(module, inputs, g, shape)
    shares = torch.ones(len(ids), dtype=g.dtype, device=g.device)
    if inputs.get("per_sample_weights") is not None:
        shares = inputs["per_sample_weights"].reshape(-1).to(g.dtype)
    if module.padding_idx is not None:
        shares = shares.masked_fill(ids == module.padding_idx, 0)
    if module.mode == "mean":
        counts = torch.zeros(len(g), dtype=g.dtype, device=g.device).index_add_(0, bags, shares)
        shares = shares / counts.clamp(min=1)[bags]
    return scatter(g[bags] * shares[:, None], bags, ids, shape)


def scatter(rows: Tensor, samples: Tensor, ids: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns [B, V, d] with each row [..., d] added at (sample, id); `shape` is (B, V)."""
    size, vocabulary = shape
    grads = rows.new_zeros((size * vocabulary, rows.shape[-1]))
    grads.index_add_(0, (samples * vocabulary + ids).reshape(-1), rows.reshape(-1, rows.shape[-1]))
    return grads.view(size, vocabulary, -1)


def _flat_bags(module: nn.EmbeddingBag, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The ids in one row, and the bag that each of them belongs to."""
    ids = inputs["input"]
    if ids.dim() == 2:
        bags = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        return ids.reshape(-1).long(), bags.reshape(-1)
    offsets = inputs["offsets"]
    starts = offsets[:-1] if module.include_last_offset else offsets
    where = torch.arange(len(ids), device=ids.device, dtype=starts.dtype)
    return ids.long(), torch.searchsorted(starts.contiguous(), where, right=True) - 1


def _max_bag(module: nn.EmbeddingBag, inputs: Inputs, g: Tensor, shape: tuple[int, int]) -> Tensor:
    """The kernel itself says which id won each feature of each bag; an empty bag has no winner."""
    ids = inputs["input"]
    if ids.dim() == 1:
        offsets = inputs["offsets"]
    else:
        offsets = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device, dtype=ids.dtype)
    with torch.no_grad():
        _, _, lengths, winners = torch.embedding_bag(
            module.weight,
            ids.reshape(-1),
            offsets,
            False,  # scale_grad_by_freq
            2,  # mode: max
            False,  # sparse
            None,  # per_sample_weights
            module.include_last_offset and ids.dim() == 1,
            module.padding_idx,
        )
    g = g.masked_fill((lengths[: len(g)] == 0)[:, None], 0)
    grads = g.new_zeros((*shape, g.shape[-1]))
    return grads.scatter_(1, winners[: len(g), None].long(), g[:, None])
