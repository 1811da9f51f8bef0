"""Every process holds a part of each parameter: FSDP2, with the ghost engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from dpsgd.engines import Engine, Ghost
from dpsgd.engines.grads import Groups, PerSampleGrads
from dpsgd.engines.sharding import reshard
from dpsgd.lost_peers import lost_peers
from dpsgd.models.blocks import blocks_of
from dpsgd.parallel.base import Parallel, Parameters, check_same, positions
from dpsgd.parallel.replicated import check_same_weights
from dpsgd.parallel.world import World

_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class _Part:
    """This process's part of a parameter: some rows of it.

    Attributes:
        rows: Rows per process; the last ones have fewer, or none.
        first: The first row.
        shape: Of the part.
    """

    rows: int
    first: int
    shape: torch.Size


class Sharded(Parallel):
    """Fully sharded data parallelism (Zhao et al. 2023, arXiv:2304.11277) by PyTorch's FSDP2.

    FSDP2 gathers the parameters of a unit while it runs, forward and backward. The ghost engine
    takes no gradient of a parameter by autograd, so FSDP2 has none to average: the clipped sums are
    reduced here, one reduce-scatter per unit and physical batch. No process ever holds more of the
    sum than its part and one unit. Each draws the noise of its part alone.
    """

    even = True

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._units: list[list[str]] = []

    def place(self, engine: Engine) -> None:
        """Shards the model's blocks and what is left of it, unless it is sharded already."""
        _check_engine(engine)
        if isinstance(engine.model, FSDPModule):
            return
        check_same_weights(self.world, engine.model)
        try:
            for block in blocks_of(engine.model):
                fully_shard(block)
            fully_shard(engine.model)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"FSDP2 cannot shard this model: {error}") from error

    def check(self, engine: Engine) -> None:
        """Raises unless every trainable parameter is sharded by rows over all processes."""
        _check_engine(engine)
        wrong = [n for n, p in engine.parameters.items() if not _by_rows(p, self.world.size)]
        if wrong or not isinstance(engine.model, FSDPModule):
            raise ValueError(
                f"Expected parameters sharded by rows over all {self.world.size} processes, got "
                f"others in {wrong or 'the outermost module'}. Apply "
                "torch.distributed.fsdp.fully_shard(model) to the whole model, over one mesh of "
                "one dimension."
            )
        check_same_weights(self.world, engine.model)
        self._units = list(_units(engine.model, engine.parameters))
        self.mesh = next(
            p for p in engine.parameters.values() if isinstance(p, DTensor)
        ).device_mesh

    def add(
        self, grads: PerSampleGrads, weights: Tensor, groups: Groups, parameters: Parameters
    ) -> None:
        """Adds the weighted sum of a physical batch of each process, unit by unit."""
        check_same(self._sums, parameters)
        for unit in self._units:
            names = [name for name in unit if name in parameters]
            sums = grads.weighted_sum(weights, groups, names=names)
            for name, part in self._reduced(sums, parameters):
                self._sums[name] = part.add_(self._sums[name]) if name in self._sums else part

    def total(self, parameters: Parameters) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Returns this process's part of the sum over all processes, and ends the step."""
        sums = self._sums
        self.discard()
        check_same(sums, parameters)
        places = positions(parameters)
        parts, offsets = {}, {}
        for name, p in parameters.items():
            part = _part_of(p, self.world)
            dtype = torch.promote_types(p.dtype, torch.float32)
            zeros = torch.zeros(part.shape, dtype=dtype, device=p.device)
            parts[name] = sums.pop(name) if name in sums else zeros
            offsets[name] = places[name] + part.first * _row_size(p)
        return parts, offsets

    def gradient(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """Returns a part of a total as this process's part of a gradient."""
        assert isinstance(parameter, DTensor)
        return DTensor.from_local(
            part.to(parameter.dtype),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the whole weights by name, gathered one after another; tied ones once."""
        names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        whole = {}
        for name, tensor in model.state_dict().items():
            if name in names:
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if self.world.leads:
                    whole[name] = full.detach().cpu().contiguous()
        return whole

    def settle(self, model: nn.Module) -> None:
        """Lets go of what FSDP2 holds whole after a forward pass without a backward pass."""
        reshard(model)

    def _reduced(
        self, sums: dict[str, Tensor], parameters: Parameters
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields this process's parts of the sums over all processes; `sums` is used up."""
        for dtype in sorted({total.dtype for total in sums.values()}, key=str):
            alike = [name for name, total in sums.items() if total.dtype == dtype]
            parts = {name: _part_of(parameters[name], self.world) for name in alike}
            sizes = [parts[name].rows * _row_size(parameters[name]) for name in alike]
            table = sums[alike[0]].new_zeros(self.world.size, sum(sizes))
            for name, column in zip(alike, table.split(sizes, 1), strict=True):
                _deal(sums.pop(name).reshape(-1), column)
            own = table.new_empty(table.shape[1])
            with lost_peers():
                _reduce_scatter(own, table.view(-1))
            for name, piece in zip(alike, own.split(sizes), strict=True):
                shape = parts[name].shape
                yield name, piece[: shape.numel()].view(shape)


def _check_engine(engine: Engine) -> None:
    if not isinstance(engine, Ghost):
        raise ValueError(
            f"Expected engine=ghost for parallel=fsdp, got {type(engine).__name__}: it is the one "
            "that looks up parameters when they are used. Use it, or parallel=ddp."
        )


def _by_rows(p: Tensor, size: int) -> bool:
    return (
        isinstance(p, DTensor)
        and tuple(p.placements) == (Shard(0),)
        and p.device_mesh.ndim == 1
        and p.device_mesh.size() == size
    )


def _units(model: nn.Module, parameters: Parameters) -> Iterator[list[str]]:
    """The names of the parameters that FSDP2 gathers together, unit by unit."""
    paths = [path for path, module in model.named_modules() if isinstance(module, FSDPModule)]
    units: dict[str, list[str]] = {path: [] for path in paths}
    for name in parameters:
        owner = max((p for p in paths if not p or name.startswith(f"{p}.")), key=len)
        units[owner].append(name)
    yield from (names for names in units.values() if names)


def _row_size(p: Tensor) -> int:
    return p.shape[1:].numel()


def _part_of(p: Tensor, world: World) -> _Part:
    """Which rows of a parameter this process holds: as `torch.chunk` cuts them."""
    if not isinstance(p, DTensor):
        raise ValueError(
            "Expected a sharded model, but FSDP2 has left it whole, as an error in a forward pass "
            "does. Build model and step anew."
        )
    rows = -(-p.shape[0] // world.size)
    first = min(world.rank * rows, p.shape[0])
    shape = p.to_local().shape
    assert shape[0] == min(rows, p.shape[0] - first), "FSDP2 cut the rows in another way"
    return _Part(rows, first, shape)


def _deal(flat: Tensor, column: Tensor) -> None:
    """Writes a flat tensor into a column [processes, n] of zeros, n numbers to each process."""
    size = column.shape[1]
    if size:
        whole, rest = divmod(len(flat), size)
        column[:whole] = flat[: whole * size].view(whole, size)
        if rest:
            column[whole, :rest] = flat[whole * size :]
