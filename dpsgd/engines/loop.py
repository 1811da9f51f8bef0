"""One backward pass per sample: slow, and right for any model that autograd can differentiate."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter

import torch
from torch import Tensor, nn

from dpsgd.engines.base import Engine
from dpsgd.engines.batch import Batch, check_losses, map_tensors
from dpsgd.engines.dense import DenseGrads
from dpsgd.engines.graph import check_no_reentrant_checkpoint


class Loop(Engine):
    """The oracle: each sample alone, as a batch of one, through ordinary autograd.

    Its float64 results define what every other engine must return.
    """

    def _compute(
        self, batch: Batch, size: int, parameters: Mapping[str, nn.Parameter]
    ) -> DenseGrads:
        losses, rows = [], []
        for i in range(size):
            sample = map_tensors(itemgetter(slice(i, i + 1)), batch)
            loss = check_losses(self.loss_fn(self.model, sample), 1)[0]
            if i == 0:
                check_no_reentrant_checkpoint(loss)
            losses.append(loss.detach())
            rows.append(gradients(loss, list(parameters.values())))
        stacked = (torch.stack(column) for column in zip(*rows, strict=True))
        return DenseGrads(torch.stack(losses), dict(zip(parameters, stacked, strict=True)))


def gradients(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Returns the gradients of one scalar, zero where it does not depend on a parameter."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return [grad.to_dense() if grad.is_sparse else grad for grad in grads]
