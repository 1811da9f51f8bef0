"""Classical hooks: each layer's input from its forward, its output gradient from one backward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dpsgd import rules
from dpsgd.engines.base import Engine, LossFn, check_no_gradient_hooks
from dpsgd.engines.batch import Batch, check_losses
from dpsgd.engines.dense import DenseGrads
from dpsgd.engines.graph import Region, check_no_reentrant_checkpoint, uncaptured
from dpsgd.engines.probe import SizeProbe, check_combination


class Hooks(Engine):
    """Per-sample gradients from each layer's input and output gradient, by `dpsgd.rules`.

    A forward hook on each layer keeps the inputs and marks the output in the graph; one backward to
    those marks brings the output gradients and computes no weight gradient. In-place activations,
    layers called several times and tied weights are exact. (The older form, full backward hooks,
    fails on in-place activations.)

    Every layer must see the samples in its first dimension, in the order of the batch: one row
    each, or as many rows for each one after another (positions, or views of an image), [B * K,
    ...]. That is checked once per batch signature; an order that depends on the data (sorting by
    length) can slip through a check, so use another engine for it.

    Raises:
        ValueError: At the first call, if trainable parameters lack a rule (all are listed), a layer
            does not see the samples first, or a parameter is used outside its layer's forward.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__(model, loss_fn)
        self._probe = SizeProbe()

    def _compute(
        self, batch: Batch, size: int, parameters: Mapping[str, nn.Parameter]
    ) -> DenseGrads:
        check_no_gradient_hooks(self.model, parameters)
        self._probe(self.model, batch, size, partial(self._check, parameters=parameters))
        return self._gradients(batch, size, parameters)

    def _check(self, batch: Batch, size: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raises unless a random combination of the gradients is what autograd says it is."""
        check_combination(self, self._gradients, batch, size, parameters)

    def _gradients(
        self, batch: Batch, size: int, parameters: Mapping[str, nn.Parameter]
    ) -> DenseGrads:
        names = {id(p): name for name, p in parameters.items()}
        layers = _layers(self.model, names)
        losses, calls = _forward(self, layers, batch, size)
        check_no_reentrant_checkpoint(losses)
        _check_captured(losses, calls, names)
        grads: dict[str, Tensor] = {}
        for call, g in zip(calls, _output_gradients(losses, calls), strict=True):
            for name, grad in {} if g is None else _per_sample(call, g, names, size):
                grads[name] = grads[name] + grad if name in grads else grad
        for name, p in parameters.items():
            if name not in grads:
                grads[name] = p.new_zeros((size, *p.shape))
        return DenseGrads(losses, {name: grads[name] for name in parameters})


@dataclass(frozen=True)
class Layer:
    """A module with trainable parameters of its own, and which function it calls with them."""

    path: str
    module: nn.Module
    describe: rules.Layer


@dataclass(frozen=True)
class Call:
    """One call of a layer: the function, its arguments, and the place of its output in the graph.

    `versions` holds, for each tensor among the inputs, its version when the layer used it.
    """

    layer: Layer
    rule: rules.Rule
    arguments: Mapping[str, Any]
    samples: frozenset[str]
    versions: Mapping[Tensor, int]
    output: GradientEdge
    region: Region


def _layers(model: nn.Module, names: Mapping[int, str]) -> list[Layer]:
    layers, missing = [], []
    for path, module in model.named_modules():
        own = [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names]
        describe = rules.lookup_layer(module) if own else None
        if describe is not None:
            layers.append(Layer(path, module, describe))
        else:
            missing += [f"{name} ({type(module).__name__} at '{path}')" for name in own]
    if missing:
        raise ValueError(
            f"No rule for these trainable parameters: {'; '.join(missing)}. Describe the layer "
            "with @dpsgd.rules.register_layer, freeze them, or use engine=ghost, engine=vmap or "
            "engine=loop."
        )
    return layers


def _forward(engine: Engine, layers: list[Layer], batch: Batch, size: int) -> Any:
    """Runs the loss once with hooks on the layers; returns (losses, calls)."""
    calls: list[Call] = []
    with _hooked(layers, calls, size):
        losses = check_losses(engine.loss_fn(engine.model, batch), size)
    return losses, calls


@contextmanager
def _hooked(layers: list[Layer], calls: list[Call], size: int) -> Iterator[None]:
    handles = []
    try:
        for layer in layers:
            hook = partial(_record, layer, calls, size)
            handles.append(layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record(
    layer: Layer,
    calls: list[Call],
    size: int,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> Tensor:
    """The forward hook: notes the call and returns the output under a node of its own.

    An alias that autograd does not count as a view survives later in-place operations: they put
    their nodes after it, and its gradient stays that of the layer's own output.
    """
    if not output.requires_grad:
        return output
    inputs = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    tensors = {n: v for n, v in list(inputs.items())[1:] if isinstance(v, Tensor)}
    _check_samples_first(layer, tensors, output, size)
    alias = torch.ops.aten._unsafe_view(output, output.shape)
    with torch.no_grad():
        function, given = layer.describe(module, *args, **kwargs)
    rule = rules.lookup(function)
    if rule is None:
        raise ValueError(f"No rule for {function}, which '{layer.path}' calls.")
    arguments = rule.bind((), given)
    assert arguments is not None, f"{layer.path} does not describe a call of {function}"
    samples = frozenset(n for n in rule.samples if _has_samples(arguments[n], inputs))
    weights = {id(value) for n, value in arguments.items() if n in rule.weights}
    region = Region(
        alias.grad_fn, {t.grad_fn for t in tensors.values() if t.grad_fn is not None}, weights
    )
    kept = {n: v.detach() if n in samples else v for n, v in arguments.items()}
    versions = {value: value._version for value in tensors.values()}
    edge = get_gradient_edge(alias)
    calls.append(Call(layer, rule, kept, samples, versions, edge, region))
    return alias


def _has_samples(argument: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether an argument has one row per sample; ragged bags do not."""
    return isinstance(argument, Tensor) and not isinstance(inputs.get("offsets"), Tensor)


def _check_samples_first(
    layer: Layer, inputs: Mapping[str, Tensor], output: Tensor, size: int
) -> None:
    ragged = "offsets" in inputs
    shapes = [output.shape] + ([] if ragged else [value.shape for value in inputs.values()])
    least = _least_dims(layer.module)
    rows = {shape[0] if len(shape) else 0 for shape in shapes}
    whole = rows == {size} or (not ragged and len(rows) == 1 and min(rows) % size == 0 < min(rows))
    if whole and output.dim() >= least:
        return
    raise ValueError(
        f"Expected '{layer.path}' ({type(layer.module).__name__}) to see the {size} samples in its "
        f"first dimension, got shapes {[list(shape) for shape in shapes]}. Transpose or expand "
        "to [B, ...] before the layer, or use engine=vmap or engine=loop, which keep the samples "
        "apart by themselves."
    )


def _least_dims(module: nn.Module) -> int:
    """Dimensions of a batched output: layers that also take one sample without B need it told."""
    for dims in (1, 2, 3):
        if isinstance(module, _SPATIAL[dims]):
            return dims + 2
    return 1 if isinstance(module, nn.PReLU) else 2


_SPATIAL: Mapping[int, tuple[type[nn.Module], ...]] = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.InstanceNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.InstanceNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d),
}


def _check_captured(losses: Tensor, calls: list[Call], names: Mapping[int, str]) -> None:
    missed = uncaptured(losses, [call.region for call in calls], names)
    if missed:
        raise ValueError(
            f"The losses use {missed} outside the forward of the layer that owns them, where hooks "
            "do not see it. Call the layer itself, or use engine=vmap or engine=loop."
        )


def _output_gradients(losses: Tensor, calls: list[Call]) -> tuple[Tensor | None, ...]:
    if not calls or not losses.requires_grad:
        return (None,) * len(calls)
    edges = [call.output for call in calls]
    return torch.autograd.grad(losses.sum(), edges, allow_unused=True)


def _per_sample(
    call: Call, g: Tensor, names: Mapping[int, str], size: int
) -> Iterator[tuple[str, Tensor]]:
    if any(value._version != version for value, version in call.versions.items()):
        raise ValueError(
            f"The input of '{call.layer.path}' was modified in place after the layer used "
            "it. Replace the in-place operation, or use engine=vmap or engine=loop."
        )
    apart = {n: call.arguments[n].unflatten(0, (size, -1)) for n in call.samples}
    captured = rules.Call({**call.arguments, **apart}, call.samples, g.unflatten(0, (size, -1)))
    with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
        for argument in call.rule.weights:
            p = call.arguments[argument]
            if id(p) in names:
                yield names[id(p)], call.rule.materialize(captured.to(p.dtype), argument)
