"""The ghost engine: one forward, one backward, gradients formed only where that is cheaper."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dpsgd.engines.base import Engine, LossFn, check_no_gradient_hooks
from dpsgd.engines.batch import (
    Batch,
    Signature,
    check_losses,
    map_tensors,
    signature_of,
    size_of,
)
from dpsgd.engines.ghost.activations import Activations
from dpsgd.engines.ghost.capture import Capture, Restart, Split
from dpsgd.engines.ghost.leftovers import no_leftovers
from dpsgd.engines.ghost.part import Part
from dpsgd.engines.ghost.physical import Samples
from dpsgd.engines.ghost.special import SPECIAL
from dpsgd.engines.ghost.strategies import FASTEST, Strategies
from dpsgd.engines.ghost.tape import Tape
from dpsgd.engines.ghost.taped import TapedGrads
from dpsgd.engines.graph import leaves
from dpsgd.engines.probe import RandomState
from dpsgd.engines.sharding import Names
from dpsgd.lost_peers import is_lost_peer


class Ghost(Engine):
    """Exact clipping of any model from one forward and one backward pass, nothing replaced.

    The loss runs once inside `torch.vmap`, which keeps the samples apart by construction, under a
    function mode that captures every torch function in which samples meet weights, whatever module
    it sits in. There the ordinary kernel runs on the whole batch with detached weights; one
    backward pass records inputs and output gradients, from which norms and weighted sums follow.

    Where samples disagree about control flow (`if mask.all()`), the batch is split and the parts
    run on their own. What cannot be per sample is refused by name.

    Args:
        model: The model.
        loss_fn: One loss per sample.
        strategy: How norms and sums are taken where there are several ways: `fastest`, `lean`,
            `formulas` or a single one, see `Strategies`.

    Raises:
        ValueError: At a call, if the samples cannot be kept apart in some function, or the losses
            use a parameter in a way that cannot be captured (TorchScript, custom functions).
    """

    takes_shards = True

    def __init__(self, model: nn.Module, loss_fn: LossFn, strategy: str = FASTEST) -> None:
        super().__init__(model, loss_fn)
        self._per_sample: set[Signature] = set()
        self._activations: dict[Signature, int] = {}
        self._strategies = Strategies(strategy, self.choices)

    def _compute(
        self, batch: Batch, size: int, parameters: Mapping[str, nn.Parameter]
    ) -> TapedGrads:
        check_no_gradient_hooks(self.model, parameters)
        device = next(iter(parameters.values())).device
        check_not_scripted(self.model, self.loss_fn)
        names = Names(self.model, parameters)
        with no_leftovers(self.model):
            parts = self._parts(batch, torch.arange(size, device=device), parameters, names)
        _check_known(parts, parameters)
        grads = TapedGrads(parts, parameters)
        grads.watch(batch)
        return grads

    def _parts(
        self, batch: Batch, rows: Tensor, parameters: Mapping[str, nn.Parameter], names: Names
    ) -> list[Part]:
        """Runs some rows of the whole batch, split where they disagree about control flow."""
        try:
            part = Part(rows, parameters, names, self._strategies, size_of(batch))
            self._run(_take(batch, rows), part, names)
            return [part]
        except Split as split:
            _check_whole(names, "the samples disagree about control flow (`if x.any():`)")
            groups = split.group.to(rows.device)
        parts = []
        for group in groups.unique():
            parts += self._parts(batch, rows[groups == group], parameters, names)
        return parts

    def _run(self, batch: Batch, part: Part, names: Names) -> None:
        """Runs the loss on samples that agree, once more if it writes them into constants."""
        signature = signature_of(batch)
        # what ran before like this hardly ever restarts, and draws anew if it does
        state = None if signature in self._activations else RandomState(self.model)
        try:
            self._capture(batch, part, names)
        except Restart:
            _check_whole(names, "the loss writes samples into tensors that it made without them")
            self._per_sample.add(signature)
            if state is not None:
                state.restore()
            self._capture(batch, part, names)

    def _capture(self, batch: Batch, part: Part, names: Names) -> None:
        size, signature = len(part.rows), signature_of(batch)
        tape = Tape(part.rows.device, names)
        meter = None if signature in self._activations else Activations()

        def run(one: Batch) -> Tensor:
            capture = Capture(tape, Samples(size), SPECIAL, signature in self._per_sample)
            try:
                with capture, nullcontext() if meter is None else meter:
                    losses = self.loss_fn(self.model, one)
                    capture.check_nothing_swallowed()
                    check_losses(losses, 1)
                physical = capture.samples.enter(capture.expand(losses))[:, 0]
                _check_complete(physical, names, tape)
                if meter is not None:
                    self._activations[signature] = meter.held() // size
                part.expect(tape.sites)
                tape.backward(physical, capture, part.take)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, IndexError) as error:
                if names.sharded and is_lost_peer(error):
                    raise
                if isinstance(error, IndexError) and not capture.caused(error):
                    raise
                if names.sharded and "DTensor" in str(error):
                    raise ValueError(_OUTSIDE.format(_place(error, self.model))) from error
                raise ValueError(self._explained(error, capture)) from error
            return capture.samples.leave(physical.detach())

        losses = torch.vmap(run, randomness="different")(map_tensors(_as_one, batch))
        part.finish(losses, self._activations[signature])
        if any(leaf is tape.anchor for leaf in part.foreign):
            raise ValueError(
                "engine=ghost cannot run this model: some function takes samples out of "
                "torch.vmap, where their gradients would be lost. Use engine=loop."
            )

    def _explained(self, error: BaseException, capture: Capture) -> str:
        function = capture.caused(error) or "the model"
        place = _place(error, self.model)
        hint = _MASKS if "boolean mask" in str(error) else ""
        return (
            f"engine=ghost cannot run {function}{place} with the samples kept apart: "
            f"{str(error).rstrip('. ')}. {hint}Use engine=loop, which runs each sample on its own."
        )


_OUTSIDE = (
    "engine=ghost met a part of a parameter that FSDP2 has not gathered{}: it is used outside of "
    "the unit that it belongs to. Shard that module together with its user, or use parallel=ddp."
)
_MASKS = (
    "Instead of x[mask] = value write x.masked_fill(mask, value) or torch.where; instead of "
    "x[mask] in a loss weigh the positions, (x * mask).sum(1), or use ignore_index; engine=hooks "
    "may run it. "
)


def _check_complete(losses: Tensor, names: Names, tape: Tape) -> None:
    """Raises if a parameter is still reachable in the graph of the losses.

    Captured functions get detached weights, so what the losses reach was not captured. Of a sharded
    model any other leaf may be a parameter, too: nobody knows it by its name.

    Raises:
        ValueError: Naming the parameters.
    """
    named = [(names.get(leaf), leaf) for leaf in leaves(losses) if leaf is not tape.anchor]
    missed = [name for name, _ in named if name is not None]
    if names.sharded:
        missed += [f"a trainable tensor {list(leaf.shape)}" for name, leaf in named if name is None]
    if missed:
        raise ValueError(
            f"The losses use {missed} where engine=ghost does not see it (TorchScript, a "
            "custom autograd.Function?). Use engine=loop, or write that part with torch "
            "functions."
        )


def _check_whole(names: Names, why: str) -> None:
    """Raises for a second forward pass over a sharded model, which other processes may not make."""
    if names.sharded:
        raise ValueError(
            f"engine=ghost cannot run this model sharded by FSDP2: {why}, which takes another "
            "pass that the other processes would wait for. Use parallel=ddp."
        )


def check_not_scripted(model: nn.Module, loss_fn: LossFn) -> None:
    """Raises if the model contains TorchScript, which loses gradients under vmap once it is warm.

    Modules are found, and functions that forward methods or the loss refer to by name.

    Raises:
        ValueError: Naming what is scripted.
    """
    places = {f"'{path}'": m for path, m in model.named_modules()}
    found = [place for place, m in places.items() if isinstance(m, torch.jit.ScriptModule)]
    kinds = [type(m) for m in places.values() if not isinstance(m, torch.jit.ScriptModule)]
    functions = {kind.__name__: kind.forward for kind in kinds}
    for place, function in {**functions, "the loss function": loss_fn}.items():
        code, scope = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        used = [scope.get(name) for name in code.co_names] if code is not None else []
        found += [place for value in used if isinstance(value, torch.jit.ScriptFunction)]
    if found:
        raise ValueError(
            f"Expected no TorchScript, which engine=ghost does not see into, got some in "
            f"{', '.join(found)}. Use engine=loop, or the functions without torch.jit.script."
        )


def _take(batch: Batch, rows: Tensor) -> Batch:
    def take(x: Tensor) -> Tensor:
        return x if len(x) == len(rows) else x[rows.to(x.device)]

    return map_tensors(take, batch)


def _as_one(x: Tensor) -> Tensor:
    """[B, ...] as [B, 1, ...]: a batch of one for each sample."""
    return x.unsqueeze(1)


def _place(error: BaseException, model: nn.Module) -> str:
    """Where in the model an error came from, " in 'layers.3' (Gate)", if anywhere."""
    paths = {id(module): path for path, module in model.named_modules() if path}
    place = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if id(module) in paths:
            place = f" in '{paths[id(module)]}' ({type(module).__name__})"
    return place


def _check_known(parts: list[Part], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises if the losses use a trainable tensor that may be a parameter in disguise.

    Raises:
        ValueError: If there is one while some parameter seems unused.
    """
    unused = [name for name in parameters if not any(part.routes[name] for part in parts)]
    foreign = [leaf for part in parts for leaf in part.foreign]
    if unused and foreign:
        raise ValueError(
            f"The losses use a trainable tensor {list(foreign[0].shape)} that is no parameter of "
            f"the model, while {unused} seem unused. If it is a parameter in disguise (sharded, "
            "copied), give the engine the module that owns it; if it is not trained, call "
            "requires_grad_(False) on it."
        )
