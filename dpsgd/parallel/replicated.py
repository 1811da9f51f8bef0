"""Every process holds the whole model: one process alone, or data parallelism."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from dpsgd.engines import Engine
from dpsgd.engines.flat import Flat
from dpsgd.engines.grads import Groups, PerSampleGrads
from dpsgd.engines.sharding import is_sharded
from dpsgd.parallel.base import Parallel, Parameters, check_same, positions
from dpsgd.parallel.world import World


class Replicated(Parallel):
    """The whole sum in each process, added up by one all-reduce per step.

    Afterwards all processes hold the same sum, add the same noise, a function of the shared key,
    and take the same step.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._flat: Flat | None = None

    def place(self, engine: Engine) -> None:
        """Leaves the model as it is."""

    def check(self, engine: Engine) -> None:
        """Raises unless all processes hold the same weights, all of them."""
        if is_sharded(engine.parameters):
            raise ValueError(
                "Expected parallel=dpsgd.parallel.fsdp() for a model that FSDP2 has sharded."
            )
        check_same_weights(self.world, engine.model)

    def add(
        self, grads: PerSampleGrads, weights: Tensor, groups: Groups, parameters: Parameters
    ) -> None:
        """Adds the weighted sum of a physical batch."""
        started = self.pending
        self._sums = self._sums or self._memory(parameters)
        grads.weighted_sum(weights, groups, out=self._sums, beta=float(started))

    def total(self, parameters: Parameters) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Returns the sum over all processes, whole, and ends the step."""
        sums = self._sums
        self.discard()
        check_same(sums, parameters)
        if not sums:
            sums = self._memory(parameters)
            for total in sums.values():
                total.zero_()
        assert self._flat is not None
        for block in self._flat.blocks():
            self.world.sum_(block)
        return sums, positions(parameters)

    def gradient(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """Returns the whole total as a gradient."""
        return part.to(parameter.dtype)

    def weights(self, model: nn.Module) -> None:
        """Returns None: the model holds its weights."""

    def settle(self, model: nn.Module) -> None:
        """Does nothing: the model has one form."""

    def _memory(self, parameters: Parameters) -> dict[str, Tensor]:
        """Tensors for the sums, those of the last step again if nobody holds them any more."""
        shapes = {name: p.shape for name, p in parameters.items()}
        dtypes = {n: torch.promote_types(p.dtype, torch.float32) for n, p in parameters.items()}
        device = next(iter(parameters.values())).device
        if self._flat is None or not self._flat.fits(shapes, dtypes, device):
            self._flat = Flat.like(shapes, dtypes, device)
        return self._flat.tensors(shapes)


def single() -> Replicated:
    """Returns the way of one process alone."""
    return Replicated(World())


def ddp() -> Replicated:
    """Returns data parallelism over torch.distributed's default group.

    Raises:
        ValueError: If there is none.
    """
    return Replicated(World.current())


def check_same_weights(world: World, model: nn.Module) -> None:
    """Raises unless all processes hold the same parameters and buffers, sharded ones left out.

    Raises:
        ValueError: Naming those that differ.
    """
    if world.size > 1:
        world.agree(_digests(model), "initial weights")


def _digests(model: nn.Module) -> dict[str, str]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    whole = {name: x for name, x in tensors.items() if not is_sharded({name: x})}
    return {name: f"{_digest(x)} {list(x.shape)} {x.dtype}" for name, x in whole.items()}


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:12]
