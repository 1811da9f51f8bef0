"""Rules: the per-sample gradient of a layer's parameter from its input and output gradient.

A rule is a plain function. Letters: B samples, T positions sharing a weight, d fan-in, p fan-out,
a = the layer's input, g = the gradient of the sum of the losses with respect to its output.
"""

from dpsgd.rules import conv, elementwise, embedding, linear, norm
from dpsgd.rules.registry import Inputs, Rule, lookup, register

__all__ = [
    "Inputs",
    "Rule",
    "conv",
    "elementwise",
    "embedding",
    "linear",
    "lookup",
    "norm",
    "register",
]
