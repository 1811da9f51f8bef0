"""Probabilistic context-free grammars: sentences whose entropy is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Rules = Mapping[str, Sequence[tuple[float, Sequence[str]]]]
"""For each symbol its expansions and their weights; what is no key of the mapping is a word."""


@dataclass(frozen=True)
class Grammar:
    """A grammar without recursion, in which no two derivations give the same words.

    Then the surprise of a text is the surprise of the choices made, and both have an entropy that
    follows from the weights: what the best possible model of the texts cannot get below.

    Attributes:
        start: The symbol that a text is.
        rules: The expansions of each symbol; weights need not add up to one.
    """

    start: str
    rules: Rules

    def derive(self, draws: Iterator[float]) -> tuple[list[str], float]:
        """Returns a text, and its surprise in nats, -log of its probability.

        Args:
            draws: Uniform numbers in (0, 1], one for each choice among more than one expansion.
        """
        words: list[str] = []
        surprise, left = 0.0, [self.start]
        while left:
            symbol = left.pop()
            if symbol not in self.rules:
                words.append(symbol)
                continue
            shares = self._shares[symbol]
            chosen = _chosen(shares, next(draws)) if len(shares) > 1 else 0
            surprise -= math.log(shares[chosen])
            left.extend(reversed(self.rules[symbol][chosen][1]))
        return words, surprise

    @cached_property
    def entropy(self) -> float:
        """The mean surprise of a text, in nats."""
        return self._totals[self.start][0]

    @cached_property
    def mean_length(self) -> float:
        """The mean number of words of a text."""
        return self._totals[self.start][1]

    @cached_property
    def longest(self) -> int:
        """The most words that a text can have."""
        return self._totals[self.start][2]

    @cached_property
    def _shares(self) -> Mapping[str, list[float]]:
        return {
            symbol: [weight / sum(w for w, _ in expansions) for weight, _ in expansions]
            for symbol, expansions in self.rules.items()
        }

    @cached_property
    def _totals(self) -> Mapping[str, tuple[float, float, int]]:
        """Entropy, mean and largest length of what comes of each symbol."""
        found: dict[str, tuple[float, float, int]] = {}

        def total(symbol: str) -> tuple[float, float, int]:
            if symbol not in self.rules:
                return 0.0, 1.0, 1
            if symbol not in found:
                entropy, length, longest = 0.0, 0.0, 0
                for share, (_, parts) in zip(self._shares[symbol], self.rules[symbol]):
                    below = [total(part) for part in parts]
                    entropy += share * (sum(h for h, _, _ in below) - math.log(share))
                    length += share * sum(n for _, n, _ in below)
                    longest = max(longest, sum(most for _, _, most in below))
                found[symbol] = entropy, length, longest
            return found[symbol]

        total(self.start)
        return found


def _chosen(shares: Sequence[float], draw: float) -> int:
    for index, share in enumerate(shares):
        draw -= share
        if draw <= 0:
            return index
    return len(shares) - 1
