"""Which way norms and sums are taken: by formulas, or the fastest of all ways, timed once."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpsgd.engines.base import Choices
from dpsgd.engines.ghost.timings import Timings, seconds
from dpsgd.engines.ghost.use import Use
from dpsgd.rules import Call
from dpsgd.rules.rows import CHUNK_BYTES, add_weighted_rows, squared_norms

FASTEST, LEAN, FORMULAS = "fastest", "lean", "formulas"

SHARE = {FASTEST: 1.25, LEAN: 1.10}
"""Peak memory that gradients may be kept up to, in units of what ordinary training holds."""

MAX_SECONDS = 5.0
"""The most time that an engine spends on timing; what is left then goes by formulas."""

_SMALL = 1 << 20
_HOPELESS = 4.0
_log = logging.getLogger("dpsgd")


@dataclass(frozen=True)
class Strategy:
    """One way to the norms and the sum for a weight of a call.

    Attributes:
        name: `keep-FORM` forms the gradients once and reads the sum off them; any other name takes
            the norms in that way and the sum from an ordinary contraction.
        form: How the gradients are formed, None if they are not kept.
        norms: How the norms are taken if they are not.
    """

    name: str
    form: Callable[[Call], Tensor] | None = None
    norms: Callable[[Call], Tensor] | None = None


def strategies_of(use: Use) -> dict[str, Strategy]:
    """Returns all strategies for a use of a parameter, by name."""
    ways = use.rule.ways(use.call, use.argument)
    kept = {f"keep-{way}": Strategy(f"keep-{way}", form=form) for way, form in ways.forms.items()}
    return kept | {way: Strategy(way, norms=norms) for way, norms in ways.norms.items()}


class Strategies:
    """Chooses a strategy for each parameter from shapes alone, never from what tensors hold.

    Args:
        choice: `fastest`: timed on made-up tensors of the same shapes, gradients being kept where
            that saves time up to 1.25 times the memory of ordinary training; `lean`: up to 1.10
            times; `formulas`: nothing is timed; or the name of a strategy (`gram`, `keep-product`,
            ...), taken wherever it exists.
        choices: Where what was found is noted by name, and what was found before stands.

    Raises:
        ValueError: If the choice is no word of this kind.
    """

    def __init__(self, choice: str, choices: Choices | None = None) -> None:
        if not isinstance(choice, str) or choice not in KNOWN:
            raise ValueError(f"Expected strategy to be one of {', '.join(KNOWN)}, got {choice!r}.")
        self._choice = choice
        self._choices = Choices() if choices is None else choices
        self._plans: dict[Any, Strategy | None] = {}
        self._left = MAX_SECONDS

    def __getstate__(self) -> dict[str, Any]:
        kept = "_choice", "_choices", "_left"
        return {"_plans": {}, **{name: getattr(self, name) for name in kept}}

    def choose(
        self, uses: Mapping[str, Sequence[Use]], size: int, activations: int
    ) -> dict[str, Strategy]:
        """Returns strategies by the names of parameters; what has none goes by formulas.

        Only a whole batch is timed: how large its parts are depends on what the samples hold.

        Args:
            uses: All uses of each parameter, in one part of a batch.
            size: The size of the whole batch, which is public, for what is timed.
            activations: Bytes per sample that the forward pass holds for the backward pass.
        """
        single = {name: u[0] for name, u in uses.items() if len(u) == 1 and u[0].source.view}
        waiting = {
            name: use
            for name, use in single.items()
            if use.call.size == size and not self.planned(name, use, size)[0]
        }
        found = self._timed(waiting, uses, size, activations)
        for name, use in waiting.items():
            strategy = found.get(name)
            self._plans[name, size, use.shapes] = strategy
            self._choices.made[_words(name, use, size)] = strategy.name if strategy else FORMULAS
        plans = {name: self.planned(name, use, size)[1] for name, use in single.items()}
        return {name: strategy for name, strategy in plans.items() if strategy is not None}

    def planned(self, name: str, use: Use, size: int) -> tuple[bool, Strategy | None]:
        """Returns whether it is settled how a use goes, and the strategy, None for formulas."""
        if self._choice == FORMULAS:
            return True, None
        if self._choice not in SHARE:
            return True, strategies_of(use).get(self._choice)
        if use.bytes_held * size <= _SMALL:
            return True, None
        key = name, size, use.shapes
        if key not in self._plans:
            word = self._choices.made.get(_words(name, use, size))
            if word is None and not self._choices.final:
                return False, None
            self._plans[key] = strategies_of(use).get(word or FORMULAS)
        return True, self._plans[key]

    def _timed(
        self,
        single: Mapping[str, Use],
        uses: Mapping[str, Sequence[Use]],
        size: int,
        activations: int,
    ) -> dict[str, Strategy]:
        """The fastest without keeping, then keeping where it saves the most time for its memory."""
        if not single:
            return {}
        timings = Timings(next(iter(single.values())).call.g.device)
        chosen: dict[str, Strategy] = {}
        gains: list[tuple[float, str, Strategy]] = []
        for name, use in single.items():
            offered = strategies_of(use)
            times = self._times(use, offered, size, timings) if offered else {}
            kept, dropped = (
                min(
                    (way for way in times if (offered[way].form is not None) == keeps),
                    key=times.__getitem__,
                    default=None,
                )
                for keeps in (True, False)
            )
            if dropped is not None:
                chosen[name] = offered[dropped]
            if kept is not None:
                gain = math.inf if dropped is None else times[dropped] - times[kept]
                extra = size * (use.bytes_formed - use.bytes_held)
                if gain > 0:
                    gains.append((gain / max(extra, 1), name, offered[kept]))
        memory = _Memory(uses, size, activations)
        for _, name, strategy in sorted(gains, key=lambda gain: -gain[0]):
            if memory.allows(name, SHARE[self._choice]):
                chosen[name] = strategy
        timings.save()
        return chosen

    def _times(
        self, use: Use, offered: Mapping[str, Strategy], size: int, timings: Timings
    ) -> dict[str, float]:
        """Seconds of each strategy; few or none once the time for timing is spent."""
        key = f"{use.key} batch={size}"
        found = {name: t for name, t in timings.of(key).items() if name in offered}
        if found.keys() == offered.keys():
            return found
        if self._left <= 0:
            return {}
        watch = _Watch(use, use.wide(), size)
        for name, strategy in offered.items():
            best = min(found.values(), default=math.inf)
            if strategy.form is not None and size * use.bytes_formed > watch.most_bytes:
                found[name] = math.inf
            else:
                found[name], spent = watch.time(strategy, best)
                self._left -= spent
        timings.note(key, found)
        if self._left <= 0:
            _log.info("Timing of strategies stopped after %g s.", MAX_SECONDS)
        return found


def _words(name: str, use: Use, size: int) -> str:
    return f"{name} {use.key} batch={size}"


class _Memory:
    """What a backward pass holds as it goes, for a whole batch.

    Ordinary training holds its activations and lets go of them on the way. This one keeps on the
    way what norms and sums need: inputs and output gradients of calls, or gradients.

    Args:
        uses: All uses of each parameter, in the order of the backward pass.
        size: The size of the batch.
        activations: Bytes per sample that the forward pass holds.
    """

    def __init__(self, uses: Mapping[str, Sequence[Use]], size: int, activations: int) -> None:
        self._activations = size * activations
        self._held = {n: size * sum(use.bytes_held for use in some) for n, some in uses.items()}
        self._formed = {n: size * sum(u.bytes_formed for u in some) for n, some in uses.items()}
        self._kept = {n: min(held, self._formed[n]) for n, held in self._held.items()}
        gradients = [use.call.g for some in uses.values() for use in some]
        self._largest = max(size * (g.nbytes // max(1, len(g))) for g in gradients)

    def allows(self, name: str, share: float) -> bool:
        """Notes that a parameter's gradients are kept, if that does not take too much.

        Args:
            name: The parameter.
            share: The most that may be held at any time, in units of what ordinary training holds.
        """
        before, self._kept[name] = self._kept[name], self._formed[name]
        limit = share * (self._activations + 2 * self._largest)
        allowed = self._kept[name] <= before or self._peak() <= limit
        if not allowed:
            self._kept[name] = before
        return allowed

    def _peak(self) -> float:
        everything = sum(self._held.values())
        passed = kept = 0
        peak = float(self._activations)
        for name, held in self._held.items():
            passed, kept = passed + held, kept + self._kept[name]
            peak = max(peak, self._activations * (1 - passed / everything) + kept)
        return peak + 2 * self._largest + CHUNK_BYTES  # copies in passing


class _Watch:
    """Times strategies on made-up calls: on few samples, and on all if there is any hope."""

    def __init__(self, use: Use, call: Call, size: int) -> None:
        self._use, self._size = use, size
        self._calls = call.like(max(1, size // 32)), call.like(size)
        weight = call[use.argument]
        self._out = torch.zeros(weight.shape, dtype=call.g.dtype, device=call.g.device)
        self._contraction: float | None = None
        self.most_bytes = 4 * size * use.bytes_held + _SMALL

    def time(self, strategy: Strategy, best: float) -> tuple[float, float]:
        """Returns how long norms and sum take, and how long it took to find out."""
        form, norms = strategy.form, strategy.norms
        if form is not None:
            return self._seconds(lambda call: self._kept(form, call), best)
        assert norms is not None
        before = 0.0
        if self._contraction is None:
            self._contraction, before = self._seconds(self._contract, math.inf)
        found, spent = self._seconds(norms, best - self._contraction)
        return found + self._contraction, spent + before

    def _seconds(self, what: Callable[[Call], object], best: float) -> tuple[float, float]:
        few, all_ = self._calls
        device = few.g.device
        start = time.perf_counter()
        try:
            estimate = seconds(lambda: what(few), device) * self._size / few.size
            if estimate < _HOPELESS * max(best, 0.0):
                estimate = seconds(lambda: what(all_), device)
        except torch.OutOfMemoryError:
            estimate = math.inf
        return estimate, time.perf_counter() - start

    def _contract(self, call: Call) -> None:
        weights = torch.ones(call.size, dtype=call.g.dtype, device=call.g.device)
        self._use.rule.add_weighted_sum(call, self._use.argument, weights, self._out, 1.0)

    def _kept(self, form: Callable[[Call], Tensor], call: Call) -> None:
        weights = torch.ones(call.size, dtype=call.g.dtype, device=call.g.device)
        formed = form(call)
        squared_norms(formed)
        add_weighted_rows(self._out, weights, formed, None, 1.0)


KNOWN = (
    FASTEST,
    LEAN,
    FORMULAS,
    "gram",
    "symmetric",
    "lags",
    *(
        keep + way
        for keep in ("", "keep-")
        for way in ("product", "windows", "grouped", "channels_last", "loop")
    ),
)
"""Every choice there is."""
