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
from dpsgd.engines.ghost.arguments import (
    FACTORIES,
    SAMPLES,
    WEIGHTS,
    is_weight,
    kinds_of,
    replace_tensors,
    writes,
)
from dpsgd.engines.ghost.opened import can_open, opened
from dpsgd.engines.ghost.physical import Samples, is_wrapped, outside_vmap, tap
from dpsgd.engines.ghost.tape import Tape
from dpsgd.rules import Rule

Function = Callable[..., Any]


class Restart(BaseException):
    """The loss writes samples into tensors that it made without them.

    It must run again with such tensors, constants and computed weights, made for each sample.
    """


class Split(BaseException):
    """The samples disagree about control flow.

    Attributes:
        group: A number for each sample [B]; those with the same agree.
    """

    def __init__(self, group: Tensor) -> None:
        super().__init__()
        self.group = group


class Capture(TorchFunctionMode):
    """Runs what has a rule on the whole batch with detached weights, and taps its output.

    A tensor under vmap belongs to samples; any other that requires a gradient is a weight: a
    parameter, or computed from parameters alone. Calls with both are captured: by the rule of the
    function, or with each weight replaced by a tapped expansion [B, *shape] of stride 0.

    Args:
        tape: Takes the records.
        samples: The sample axis.
        special: Treatments of functions, called with (capture, function, args, kwargs).
        per_sample: Whether what is made without samples is made once for each of them.
    """

    def __init__(
        self,
        tape: Tape,
        samples: Samples,
        special: Mapping[Function, Callable[..., Any]],
        per_sample: bool,
    ) -> None:
        super().__init__()
        self.tape = tape
        self.samples = samples
        self.per_sample = per_sample
        self.restart: Restart | None = None
        self.split: Split | None = None
        self.hooked: list[tuple[Tensor, int]] = []
        self.failed: tuple[BaseException, Function] | None = None
        self._special = special
        self._aliases: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._expanded: dict[tuple[int, int], Tensor] = {}

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
        except (RuntimeError, NotImplementedError, IndexError) as error:
            if self.failed is None or self.failed[0] is not error:
                self.failed = error, func
            raise

    def call(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs a function as its arguments demand."""
        kinds = kinds_of(args) | kinds_of(kwargs.values()) if kwargs else kinds_of(args)
        if not kinds & SAMPLES:
            return self._without_samples(func, args, kwargs, bool(kinds & WEIGHTS))
        if kinds & WEIGHTS and torch.is_grad_enabled():
            if writes(func) and is_weight(args[0]):
                self.make_per_sample("samples are written into a parameter in place")
            if rules.lookup(func) is None and can_open(func):
                return self.open(func, args, kwargs)
            result = self._by_rule(func, args, kwargs)
            if result is not None:
                return result
            args, kwargs = self.with_expanded_weights(args, kwargs)
        elif func in DECOMPOSED:
            result = self._by_rule(func, args, kwargs)
            if result is not None:
                return result
        return self._plainly(func, args, kwargs)

    def open(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs a Python function of PyTorch under this mode."""
        with self:
            return opened(func)(*args, **kwargs)

    def with_expanded_weights(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Returns the arguments with each weight as one tensor per sample."""
        return replace_tensors(args, self.expand), replace_tensors(kwargs, self.expand)

    def expand(self, x: Tensor) -> Tensor:
        """Returns a weight as a tensor of each sample, tapped; anything else as it is."""
        if not is_weight(x) or not torch.is_grad_enabled():
            return x
        key = id(x), x._version
        if key not in self._expanded:
            site = self.tape.site(EXPANDED, {"weight": self.alias(x)}, (), ("weight",))
            with outside_vmap():
                rows = x.detach().expand(self.samples.size, *x.shape)
                tapped = tap(rows, self.tape.anchor, self.tape, site)
            self._expanded[key] = self.samples.leave(tapped)
        return self._expanded[key]

    def alias(self, x: Tensor) -> Tensor:
        """Returns a weight as it is now: one that is computed may be changed in place later."""
        if x.is_leaf or (x._base is not None and x._base.is_leaf):
            return x
        key = id(x), x._version
        if key not in self._aliases:
            with outside_vmap():
                self._aliases[key] = x, torch.ops.aten._unsafe_view(x, x.shape)
        return self._aliases[key][1]

    def check_nothing_swallowed(self) -> None:
        """Raises again what the loss function caught although it was not meant for it.

        Raises:
            Restart: See there.
            Split: See there.
            RuntimeError: If a function failed under vmap that may not fail otherwise.
        """
        hooked, self.hooked = self.hooked, []  # whose hooks hold this capture
        if any(tensor._version != version for tensor, version in hooked):
            raise ValueError(
                "Expected tensors with hooks on their gradients to stay as they are, but one was "
                "changed in place afterwards. Change a copy, or use engine=loop."
            )
        for raised in (self.split, self.restart, self.failed and self.failed[0]):
            if raised is not None:
                raise raised

    def caused(self, error: BaseException) -> str | None:
        """Returns the name of the function that an error came from, if it was a captured one."""
        return self.failed[1].__name__ if self.failed and self.failed[0] is error else None

    def make_per_sample(self, why: str) -> None:
        """Asks for another run with what is made without samples made for each of them.

        Raises:
            Restart: If that has not been done yet.
            ValueError: If it did not help.
        """
        if self.per_sample:
            raise ValueError(f"engine=ghost cannot run this model: {why}. Use engine=loop.")
        self.restart = Restart()
        raise self.restart

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
                rest |= {name: self.alias(arguments[name]) for name in wanted}
                site = self.tape.site(rule, rest, names, wanted)
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
        first = arguments[rule.samples[0]]
        if not isinstance(first, Tensor) or not self.samples.holds(first):
            return False
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                if value.is_complex():
                    return False
                if is_wrapped(value) and not (name in rule.samples and self.samples.holds(value)):
                    return False
                if is_weight(value) and name not in rule.weights:
                    return False
        return rule.accepts(arguments)

    def _without_samples(
        self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], weights: bool
    ) -> Any:
        """Weights and constants alone. What is random nevertheless is so for each sample."""
        if kwargs.get("generator") is not None:  # the same random numbers for all samples
            with outside_vmap():
                return func(*args, **kwargs)
        with _unpacked() if weights else nullcontext():
            try:
                result = func(*args, **kwargs)
            except RuntimeError:
                if writes(func) and not self.per_sample:  # random numbers into a constant
                    self.make_per_sample(f"{func.__name__} writes into a constant")
                raise
        made = kinds_of((result,))
        again = weights and torch.is_grad_enabled() and not writes(func)
        if again and (made & SAMPLES or (made and self.per_sample)):
            args, kwargs = self.with_expanded_weights(args, kwargs)
            return self._plainly(func, args, kwargs)
        if self.per_sample and func in FACTORIES and not made:
            return self.samples.leave(self.samples.enter(result).clone())
        return result

    def _plainly(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if writes(func) and not is_wrapped(args[0]) and not self.per_sample:
                self.make_per_sample(f"{func.__name__} writes samples into a constant")
            if can_open(func):
                return self.open(func, args, kwargs)
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

DECOMPOSED = {torch.nn.functional.linear, torch.addmm, torch.layer_norm, torch.group_norm}
"""Functions that vmap takes apart: frozen ones, too, run by their rule, in one kernel."""


def _unpacked() -> AbstractContextManager[Any]:
    """Keeps what autograd saves of weights as it is: a checkpoint around must not recompute it."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return saved_tensors_hooks(lambda x: x, lambda x: x)
