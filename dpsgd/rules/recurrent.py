"""Recurrent cells, backwards through time: the gradients of all gates from those of the outputs.

The weights of a recurrent layer are linear maps into its gates, one of the inputs and one of the
states before. With the gates' gradients of all steps at hand, they follow the rule of linear maps.
The states are known from the forward pass, so the gates of all steps are recomputed at once.

Letters: T steps, R sequences, H hidden units, P outputs (H, or the size of the projection). The
order of gates is PyTorch's: i f g o for an LSTM, r z n for a GRU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """The weights of one layer in one direction, detached; `projection` of an LSTM only."""

    inputs: Tensor
    states: Tensor
    input_bias: Tensor | None = None
    state_bias: Tensor | None = None
    projection: Tensor | None = None

    def flat(self) -> list[Tensor]:
        """Returns them as PyTorch's functions take them."""
        ordered = (self.inputs, self.states, self.input_bias, self.state_bias, self.projection)
        return [w for w in ordered if w is not None]


@dataclass(frozen=True)
class Steps:
    """What the forward pass left: all [T, R, ...], the states before each step being [h_0, ...].

    Attributes:
        x: Inputs [T, R, d].
        before: States before each step [T, R, P].
        after: States after each step, the outputs, [T, R, P].
        cell: The first cell state of an LSTM [R, H].
    """

    x: Tensor
    before: Tensor
    after: Tensor
    cell: Tensor | None = None


@dataclass(frozen=True)
class GateGradients:
    """The result of going back.

    Attributes:
        inputs: Gradient at the gates of the map of inputs [T, R, gates].
        states: Gradient at the gates of the map of states [T, R, gates].
        first: Gradient of the first state [R, P].
        cell: Gradient of the first cell state [R, H] of an LSTM.
        projection: Input [T, R, H] and output gradient [T, R, P] of the projection.
    """

    inputs: Tensor
    states: Tensor
    first: Tensor
    cell: Tensor | None = None
    projection: tuple[Tensor, Tensor] | None = None


def lstm(w: Weights, steps: Steps, g: Tensor, g_cell: Tensor | None) -> GateGradients:
    """Goes back through an LSTM (Hochreiter & Schmidhuber 1997), step by step to stay in cache.

    Args:
        w: Weights.
        steps: What the forward pass left.
        g: Gradient of the outputs [T, R, P], the last one including that of the last state.
        g_cell: Gradient of the last cell state [R, H].
    """
    gates = _map(steps.x, w.inputs, w.input_bias)
    gates.flatten(0, 1).addmm_(steps.before.flatten(0, 1), w.states.T)
    gates = (gates if w.state_bias is None else gates.add_(w.state_bias)).unflatten(2, (4, -1))
    assert steps.cell is not None
    cells = gates.new_empty(len(gates) + 1, *gates.shape[1::2])
    cells[0] = steps.cell
    for t, (i_f, n, o) in enumerate(zip(gates[:, :, :2], gates[:, :, 2], gates[:, :, 3])):
        i_f.sigmoid_(), n.tanh_(), o.sigmoid_()
        torch.addcmul(i_f[:, 0] * n, i_f[:, 1], cells[t], out=cells[t + 1])
    back, outputs = torch.empty_like(gates), torch.empty_like(g)
    hidden = None if w.projection is None else torch.empty_like(cells[1:])
    dh, dc = torch.zeros_like(g[0]), torch.zeros_like(cells[0]) if g_cell is None else g_cell
    for t in reversed(range(len(g))):
        i, f, n, o = gates[t].unbind(1)
        squashed = cells[t + 1].tanh()
        dh = torch.add(g[t], dh, out=outputs[t])
        du = dh if w.projection is None else dh @ w.projection
        if hidden is not None:
            torch.mul(o, squashed, out=hidden[t])
        dc = dc + _of_tanh(du * o, squashed)
        back[t, :, 0] = _of_sigmoid(dc * n, i)
        back[t, :, 1] = _of_sigmoid(dc * cells[t], f)
        back[t, :, 2] = _of_tanh(dc * i, n)
        back[t, :, 3] = _of_sigmoid(du * squashed, o)
        dh, dc = back[t].flatten(1) @ w.states, dc * f
    back = back.flatten(2)
    return GateGradients(back, back, dh, dc, None if hidden is None else (hidden, outputs))


def gru(w: Weights, steps: Steps, g: Tensor, g_cell: Tensor | None) -> GateGradients:
    """Goes back through a GRU (Cho et al. 2014, arXiv:1406.1078) in PyTorch's form; see `lstm`."""
    of_inputs = _map(steps.x, w.inputs, w.input_bias).unflatten(2, (3, -1))
    of_states = _map(steps.before, w.states, w.state_bias).unflatten(2, (3, -1))
    inputs, states = torch.empty_like(of_inputs), torch.empty_like(of_states)
    dh = torch.zeros_like(g[0])
    for t in reversed(range(len(g))):
        r, z = (of_inputs[t, :, :2] + of_states[t, :, :2]).sigmoid_().unbind(1)
        n_state, before = of_states[t, :, 2], steps.before[t]
        n = torch.addcmul(of_inputs[t, :, 2], r, n_state).tanh_()
        dh = g[t] + dh
        dn = _of_tanh(dh * (1 - z), n)
        inputs[t, :, 0] = _of_sigmoid(dn * n_state, r)
        inputs[t, :, 1] = _of_sigmoid(dh * (before - n), z)
        inputs[t, :, 2] = dn
        states[t, :, :2] = inputs[t, :, :2]
        states[t, :, 2] = dn * r
        dh = torch.addcmul(states[t].flatten(1) @ w.states, dh, z)
    return GateGradients(inputs.flatten(2), states.flatten(2), dh)


def _elman(
    nonlinearity: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Weights, Steps, Tensor, Tensor | None], GateGradients]:
    def back(w: Weights, steps: Steps, g: Tensor, g_cell: Tensor | None) -> GateGradients:
        """Goes back through a simple recurrent network (Elman 1990); see `lstm`."""
        gates, dh = torch.empty_like(g), torch.zeros_like(g[0])
        for t in reversed(range(len(g))):
            gates[t] = nonlinearity(g[t] + dh, steps.after[t])
            dh = gates[t] @ w.states
        return GateGradients(gates, gates, dh)

    return back


def _map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


_of_sigmoid: Callable[[Tensor, Tensor], Tensor] = torch.ops.aten.sigmoid_backward
_of_tanh: Callable[[Tensor, Tensor], Tensor] = torch.ops.aten.tanh_backward


BACKWARDS: Mapping[str, Callable[[Weights, Steps, Tensor, Tensor | None], GateGradients]] = {
    "lstm": lstm,
    "gru": gru,
    "rnn_tanh": _elman(_of_tanh),
    "rnn_relu": _elman(lambda g, h: g * (h > 0)),
}
"""How to go back, by the name of the torch function that goes forth."""
