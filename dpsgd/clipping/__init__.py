"""Clipping policies: from per-sample norms to the weights of the sum."""

from dpsgd.clipping.adaptive import AdaptiveQuantile
from dpsgd.clipping.base import Clipping
from dpsgd.clipping.flat import Automatic, Flat, Normalised, UnitNorm
from dpsgd.clipping.groups import Grouped, PerLayer

__all__ = [
    "AdaptiveQuantile",
    "Automatic",
    "Clipping",
    "Flat",
    "Grouped",
    "Normalised",
    "PerLayer",
    "UnitNorm",
]
