"""Rules: the per-sample gradients of a function from its inputs and its output gradient.

One mathematics for every engine that captures calls. Letters: B samples, T positions sharing a
weight, d fan-in, p fan-out, a = the function's input, g = the gradient of the sum of the losses
with respect to its output.
"""

from dpsgd.rules import conv, elementwise, embedding, linear, norm
from dpsgd.rules.layers import FunctionCall, Layer, lookup_layer, register_layer
from dpsgd.rules.registry import Call, Rule, lookup, register

__all__ = [
    "Call",
    "FunctionCall",
    "Layer",
    "Rule",
    "conv",
    "elementwise",
    "embedding",
    "linear",
    "lookup",
    "lookup_layer",
    "norm",
    "register",
    "register_layer",
]
