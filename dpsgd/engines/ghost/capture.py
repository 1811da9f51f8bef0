"""The function mode that sees every torch function in which samples meet weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from dpsgd import rules
from dpsgd.engines.ghost.opened import can_open, opened
from dpsgd.engines.ghost.physical import Samples, is_wrapped, outside_vmap, tap
from dpsgd.engines.ghost.tape import Site, Tape
from dpsgd.rules import Rule

Function = Callable[..., Any]
_SAMPLES, _WEIGHTS = 1, 2


class Restart(BaseException):
    """The loss writes samples into tensors that it made without them: make those per sample."""


class Capture(TorchFunctionMode):
    """Runs what has a rule on the whole batch with detached weights, and taps its output.

    A tensor under vmap belongs to samples; any other that requires a gradient is a weight: a
    parameter, or computed from parameters alone. Calls with both are captured: by the rule of the
    function, or with each weight replaced by a tapped expansion [B, *shape] of stride 0.

    Args:
        tape: Takes the records.
        samples: The sample axis.
        special: Treatments of functions, called with (capture, function, args, kwargs).
        batched_factories: Whether torch.zeros and its like give one tensor per sample.
    """

    def __init__(
        self,
        tape: Tape,
        samples: Samples,
        special: Mapping[Function, Callable[..., Any]],
        batched_factories: bool,
    ) -> None:
        super().__init__()
        self.tape = tape
        self.samples = samples
        self.batched_factories = batched_factories
        self.branched = False
        self.failed: tuple[BaseException, Function] | None = None
        self._special = special
        self._expanded: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Called by PyTorch instead of each torch function."""
        kwargs = kwargs or {}
        treatment = self._special.get(func)
        try:
            if treatment is not None:
                return treatment(self, func, args, kwargs)
            return self.call(func, args, kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if self.failed is None or self.failed[0] is not error:
                self.failed = error, func
            raise

    def call(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs a function as its arguments demand."""
        kinds = _kinds(args) | _kinds(kwargs.values()) if kwargs else _kinds(args)
        if not kinds & _SAMPLES:
            return self._without_samples(func, args, kwargs, bool(kinds & _WEIGHTS))
        if kinds & _WEIGHTS and torch.is_grad_enabled():
            if rules.lookup(func) is None and can_open(func):
                return self.open(func, args, kwargs)
            result = self._by_rule(func, args, kwargs)
            if result is not None:
                return result
            args, kwargs = self.with_expanded_weights(args, kwargs)
        return self._plainly(func, args, kwargs)

    def open(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs a Python function of PyTorch under this mode."""
        with self:
            return opened(func)(*args, **kwargs)

    def with_expanded_weights(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Returns the arguments with each weight as one tensor per sample."""
        return _replace(args, self.expand), _replace(kwargs, self.expand)

    def expand(self, x: Tensor) -> Tensor:
        """Returns a weight as a tensor of each sample, tapped; anything else as it is."""
        if not is_weight(x) or not torch.is_grad_enabled():
            return x
        known = self._expanded.get(id(x))
        if known is None:
            site = Site(EXPANDED, {"weight": x}, (), ("weight",))
            with outside_vmap():
                rows = x.detach().expand(self.samples.size, *x.shape)
                tapped = tap(rows, self.tape.anchor, self.tape, site)
            known = self._expanded[id(x)] = x, self.samples.leave(tapped)
        return known[1]

    def run_rule(self, rule: Rule, arguments: dict[str, Any]) -> Any:
        """Runs a function that has a rule on the whole batch, and taps it where that is wanted."""
        names = tuple(n for n in rule.samples if isinstance(arguments[n], Tensor))
        inputs = {name: self.samples.enter(arguments[name]) for name in names}
        wanted = tuple(n for n in rule.weights if is_weight(arguments[n]))
        wanted = wanted if torch.is_grad_enabled() else ()
        weights = {name: arguments[name].detach() for name in wanted}
        with outside_vmap():
            output = rule.forward(**{**arguments, **inputs, **weights})
            outputs = output if isinstance(output, tuple) else (output,)
            if wanted:
                rest = {n: v for n, v in arguments.items() if n not in names}
                site = Site(rule, rest, names, wanted)
                first = tap(outputs[0], self.tape.anchor, self.tape, site, *inputs.values())
                outputs = (first, *outputs[1:])
        left = tuple(self.samples.leave(out) for out in outputs)
        return left if isinstance(output, tuple) else left[0]

    def _by_rule(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result by the function's rule; None if it has none that covers the arguments."""
        rule = rules.lookup(func)
        arguments = rule.bind(args, kwargs) if rule is not None else None
        if rule is None or arguments is None or not self._covers(rule, arguments):
            return None
        return self.run_rule(rule, arguments)

    def _covers(self, rule: Rule, arguments: Mapping[str, Any]) -> bool:
        if not self.samples.holds(arguments[rule.samples[0]]):
            return False
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                if is_wrapped(value) and not (name in rule.samples and self.samples.holds(value)):
                    return False
                if is_weight(value) and name not in rule.weights:
                    return False
        return rule.accepts(arguments)

    def _without_samples(
        self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], weights: bool
    ) -> Any:
        """Weights and constants alone. What is random nevertheless is so for each sample."""
        with _unpacked() if weights else nullcontext():
            result = func(*args, **kwargs)
        if weights and _kinds((result,)) & _SAMPLES:
            args, kwargs = self.with_expanded_weights(args, kwargs)
            return func(*args, **kwargs)
        if self.batched_factories and func in FACTORIES:
            return self.samples.leave(self.samples.enter(result).clone())
        return result

    def _plainly(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            target = args[0] if args else None
            writes = func.__name__ == "__setitem__" or func.__name__.rstrip("_") != func.__name__
            made = isinstance(target, Tensor) and not is_wrapped(target) and not is_weight(target)
            if writes and made and not self.batched_factories:
                raise Restart from None
            raise


class Expanded(Rule):
    """A weight that a function without a rule takes as [B, *shape]: g is the gradient."""

    weights = ("weight",)
    samples = ()

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight."""
        return weight

    def materialize(self, call: rules.Call, name: str) -> Tensor:
        """Returns g."""
        return call.g


EXPANDED = Expanded()
FACTORIES = {
    torch.zeros,
    torch.ones,
    torch.empty,
    torch.full,
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.full_like,
    torch.Tensor.new_zeros,
    torch.Tensor.new_ones,
    torch.Tensor.new_empty,
    torch.Tensor.new_full,
}


def is_weight(x: Any) -> bool:
    """Whether something is a tensor that requires a gradient and belongs to no sample."""
    return isinstance(x, Tensor) and x.requires_grad and not is_wrapped(x)


def _kinds(values: Any) -> int:
    """Which kinds of tensors there are in (nested) arguments."""
    kinds = 0
    for value in values:
        if isinstance(value, Tensor):
            if is_wrapped(value):
                kinds |= _SAMPLES
            elif value.requires_grad:
                kinds |= _WEIGHTS
        elif isinstance(value, tuple | list):
            kinds |= _kinds(value)
        elif isinstance(value, dict):
            kinds |= _kinds(value.values())
    return kinds


def _replace(values: Any, by: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(values, Tensor):
        return by(values)
    if isinstance(values, dict):
        return {key: _replace(value, by) for key, value in values.items()}
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(_replace(value, by) for value in values))
    if isinstance(values, tuple | list):
        return type(values)(_replace(value, by) for value in values)
    return values


def _unpacked() -> AbstractContextManager[Any]:
    """Keeps what autograd saves of weights as it is: a checkpoint around must not recompute it."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return saved_tensors_hooks(lambda x: x, lambda x: x)
