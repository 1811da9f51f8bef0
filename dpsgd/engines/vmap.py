"""`torch.func`: the gradient of one sample, vectorised over the batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from dpsgd.engines.base import Engine, LossFn, check_no_gradient_hooks
from dpsgd.engines.batch import Batch, check_losses, map_tensors
from dpsgd.engines.dense import DenseGrads


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
        check_no_gradient_hooks(self.model, parameters)
        detached = {name: p.detach() for name, p in parameters.items()}
        try:
            grads, losses = self._function(detached, batch)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            if self.compile and "InvalidCxxCompiler" in f"{type(error).__name__}: {error}":
                warnings.warn(_NO_COMPILER, stacklevel=2)
                self.compile = False
                self._function = _per_sample_function(self.model, self.loss_fn, self.chunk_size)
                return self._compute(batch, size, parameters)
            raise ValueError(
                f"torch.func.vmap cannot run this model: {error} "
                "Use engine=loop, which needs nothing of it but autograd."
            ) from error
        if losses.requires_grad:
            raise ValueError(
                "The losses depend on a trainable tensor other than by the attribute of the module "
                "that owns it (kept in a list, a tuple or a closure?), where torch.func does not "
                "see it. Reach it through its module, or use engine=loop."
            )
        return DenseGrads(losses, {name: grads[name] for name in parameters})

    def __getstate__(self) -> dict[str, object]:
        state = super().__getstate__()
        del state["_function"]
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        Vmap.__init__(
            self, self.model, self.loss_fn, chunk_size=self.chunk_size, compile=self.compile
        )


_NO_COMPILER = (
    "engine.compile: no C++ compiler works here (set CXX, or install g++); going on without."
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


def _at_every_place(objective: _Objective, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values under one name for each (module, attribute) that holds their parameter.

    A tied parameter has several places. A module registered under several names is one place:
    swapped twice, it would not get its own parameter back.
    """
    owners = {id(objective.model.get_parameter(name)): name for name in values}
    return {
        f"{path}.{attribute}": values[owners[id(p)]]
        for path, module in objective.named_modules()
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(p) in owners
    }


def _per_sample_function(
    model: nn.Module, loss_fn: LossFn, chunk_size: int | None
) -> Callable[[dict[str, Tensor], Batch], tuple[dict[str, Tensor], Tensor]]:
    objective = _Objective(model, loss_fn)

    def loss_of_one(parameters: dict[str, Tensor], sample: Batch) -> Tensor:
        batch_of_one = map_tensors(lambda tensor: tensor.unsqueeze(0), sample)
        swapped = _at_every_place(objective, parameters)
        return functional_call(objective, swapped, (batch_of_one,), tie_weights=False)

    return vmap(
        grad_and_value(loss_of_one),
        in_dims=(None, 0),
        randomness="different",
        chunk_size=chunk_size,
    )
