"""`torch.func`: the gradient of one sample, vectorised over the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from dpsgd.engines.base import Engine, LossFn
from dpsgd.engines.batch import Batch, check_losses, map_tensors
from dpsgd.engines.grads import DenseGrads


class Vmap(Engine):
    """vmap(grad(loss)) over a functional view of the model (Horace He and Richard Zou's functorch).

    Dropout draws a different mask for each sample (`randomness="different"`).

    Args:
        model: The model.
        loss_fn: `loss_fn(model, batch) -> Tensor[B]`.
        chunk_size: Samples differentiated at once; None takes the whole batch. Lowers the memory.
        compile: Whether to compile the whole computation with `torch.compile`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        chunk_size: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(model, loss_fn)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"Expected chunk_size >= 1 or None, got {chunk_size}.")
        self.chunk_size = chunk_size
        self.compile = compile
        self._function = _per_sample_function(model, loss_fn, chunk_size)
        if compile:
            self._function = torch.compile(self._function)

    def _compute(
        self, batch: Batch, size: int, parameters: Mapping[str, nn.Parameter]
    ) -> DenseGrads:
        detached = {f"model.{name}": p.detach() for name, p in parameters.items()}
        try:
            grads, losses = self._function(detached, batch)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"torch.func.vmap cannot run this model: {error} "
                "Use engine=loop, which runs anything, or engine=hooks."
            ) from error
        return DenseGrads(losses, {name: grads[f"model.{name}"] for name in parameters})

    def __getstate__(self) -> dict[str, object]:
        state = super().__getstate__()
        del state["_function"]
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        Vmap.__init__(
            self, self.model, self.loss_fn, chunk_size=self.chunk_size, compile=self.compile
        )


class _Objective(nn.Module):
    """The loss as a module around the model, so that `functional_call` can swap its parameters.

    The loss function thereby receives the module itself, with all its attributes, not a stand-in.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return check_losses(self.loss_fn(self.model, batch), 1)[0]


def _per_sample_function(
    model: nn.Module, loss_fn: LossFn, chunk_size: int | None
) -> Callable[[dict[str, Tensor], Batch], tuple[dict[str, Tensor], Tensor]]:
    objective = _Objective(model, loss_fn)

    def loss_of_one(parameters: dict[str, Tensor], sample: Batch) -> Tensor:
        batch_of_one = map_tensors(lambda tensor: tensor.unsqueeze(0), sample)
        return functional_call(objective, parameters, (batch_of_one,))

    return vmap(
        grad_and_value(loss_of_one),
        in_dims=(None, 0),
        randomness="different",
        chunk_size=chunk_size,
    )
