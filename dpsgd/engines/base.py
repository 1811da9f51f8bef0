"""The interface of an engine: a model and a loss in, lazy per-sample gradients out."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpsgd.engines.batch import Batch, map_tensors, size_of
from dpsgd.engines.dense import DenseGrads
from dpsgd.engines.grads import PerSampleGrads
from dpsgd.engines.sharding import is_sharded, reshard
from dpsgd.lost_peers import lost_peers

LossFn = Callable[[Any, Batch], Tensor]
"""`loss_fn(model, batch) -> losses [B]`: one loss per sample, the unit of privacy."""


@dataclass
class Choices:
    """What an engine chose by its timings: another choice rounds in another way.

    Attributes:
        made: A word for each thing that was chosen.
        final: Whether nothing more is timed; what is not among `made` then goes the usual way.
    """

    made: dict[str, str] = field(default_factory=dict)
    final: bool = False


class Engine(ABC):
    """Computes per-sample gradients of `loss_fn` for one model.

    The model is used in train or eval mode as it is, and left as found. Frozen parameters get no
    gradient, tied parameters are one parameter, a parameter that the losses do not reach has a zero
    gradient.

    Args:
        model: The model; its trainable parameters are looked up anew at each call.
        loss_fn: `loss_fn(model, batch) -> Tensor[B]`, one loss per sample.

    Attributes:
        choices: What was chosen by timings, kept in checkpoints; nothing for most engines.
    """

    takes_shards: ClassVar[bool] = False
    """Whether the parameters may be sharded by FSDP2."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"Expected an nn.Module as model, got {type(model).__name__}.")
        if isinstance(loss_fn, nn.modules.loss._Loss):
            raise ValueError(
                f"Expected a function loss_fn(model, batch) -> losses [B], got {loss_fn}. Write "
                "for example `lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], "
                "reduction='none')`, or take one of dpsgd.losses."
            )
        if not callable(loss_fn):
            raise ValueError(f"Expected loss_fn(model, batch), got {type(loss_fn).__name__}.")
        self.model = model
        self.loss_fn = loss_fn
        self.choices = Choices()
        self._latest: weakref.ref[PerSampleGrads] | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, each once (a tied one under its first name).

        Raises:
            ValueError: If nothing is trainable.
        """
        reshard(self.model)
        found = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if not found:
            raise ValueError(
                "Expected a model with trainable parameters, got none with requires_grad=True."
            )
        return found

    def __call__(self, batch: Batch) -> PerSampleGrads:
        """Returns the per-sample gradients of a batch, a pytree of tensors [B, ...].

        Raises:
            ValueError: If the batch's tensors disagree in B, the loss is not one number per sample,
                or the engine cannot handle the model exactly; it never guesses.
        """
        with _lock_of(self.model), torch.inference_mode(False), torch.enable_grad():
            self._end_latest()
            parameters = self.parameters
            if is_sharded(parameters) and not self.takes_shards:
                raise ValueError(
                    f"{type(self).__name__} cannot run a model that FSDP2 has sharded. Use "
                    "engine=ghost, or parallel=ddp."
                )
            size = size_of(batch)
            if size == 0:
                grads: PerSampleGrads = _nothing(parameters)
            else:
                with lost_peers():
                    grads = self._compute(map_tensors(_without_history, batch), size, parameters)
            self._latest = weakref.ref(grads)
            return grads

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__})"

    @abstractmethod
    def _compute(
        self, batch: Batch, size: int, parameters: Mapping[str, nn.Parameter]
    ) -> PerSampleGrads:
        """Returns the gradients of a batch with at least one sample, gradients enabled."""

    def _end_latest(self) -> None:
        latest = self._latest() if self._latest else None
        if latest is not None:
            latest.expire()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}


_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def _lock_of(model: nn.Module) -> Any:
    """One lock per model: engines put hooks on it or swap its parameters while they run."""
    return _LOCKS.setdefault(model, threading.RLock())


def _without_history(tensor: Tensor) -> Tensor:
    """The tensor outside of any graph; what inference mode made can enter one only as a copy."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def check_no_gradient_hooks(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises for hooks on gradients, which only autograd's own gradients pass through.

    Raises:
        ValueError: If a parameter or a module has one.
    """
    modules = [path for path, m in model.named_modules() if has_backward_hooks(m)]
    if modules:
        raise ValueError(
            f"Expected modules without backward hooks, but {modules} have some, which would not "
            "see per-sample gradients. Remove them, or use engine=loop."
        )
    hooked = [name for name, p in parameters.items() if p._backward_hooks]
    if hooked:
        raise ValueError(
            f"Expected parameters without tensor hooks, but {hooked} have some, which would not "
            "see per-sample gradients. Remove them, or use engine=loop."
        )


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that may change gradients."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _nothing(parameters: Mapping[str, nn.Parameter]) -> DenseGrads:
    first = next(iter(parameters.values()))
    losses = torch.zeros(0, dtype=first.dtype, device=first.device)
    grads = {
        name: torch.zeros((0, *p.shape), dtype=p.dtype, device=p.device)
        for name, p in parameters.items()
    }
    return DenseGrads(losses, grads)
