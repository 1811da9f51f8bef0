"""Recurrent cells, backwards through time: the gradients of all gates from those of the outputs.

The weights of a recurrent layer are linear maps into its gates, one of the inputs and one of the
states before. With the gates' gradients of all steps at hand, they follow the rule of linear maps.
An LSTM keeps its gates from a forward pass of its own; the others recompute theirs from the states.

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
class Gates:
    """What an LSTM's forward pass leaves for its backward pass.

    Attributes:
        squashed: Sigmoids of all gates [T, R, 4 H], of twice the third, which makes its tanh.
        candidates: That tanh [T, R, H].
        cells: Cell states [T + 1, R, H], the first one before the first step.
        outputs: Their tanh [T, R, H].
    """

    squashed: Tensor
    candidates: Tensor
    cells: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Steps:
    """What the forward pass left: all [T, R, ...], the states before each step being [h_0, ...].

    Attributes:
        x: Inputs [T, R, d].
        before: States before each step [T, R, P].
        after: States after each step, the outputs, [T, R, P].
        cell: The first cell state of an LSTM [R, H].
        gates: What `lstm_forward` kept, if it ran; it is made again otherwise.
    """

    x: Tensor
    before: Tensor
    after: Tensor
    cell: Tensor | None = None
    gates: Gates | None = None


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


def lstm_forward(w: Weights, x: Tensor, first: Tensor, cell: Tensor) -> tuple[Tensor, Gates]:
    """Runs an LSTM, the inputs of all steps mapped at once; one sigmoid squashes all gates.

    tanh(u) = 2 sigmoid(2 u) - 1, so that the third gate takes part in it.

    Args:
        w: Weights.
        x: Inputs [T, R, d].
        first: First state [R, P].
        cell: First cell state [R, H].

    Returns:
        The states after each step [T, R, P], and what the backward pass needs.
    """
    size = cell.shape[1]
    doubled = w.inputs.new_ones(4, size)
    doubled[2] = 2
    doubled = doubled.view(-1)
    of_states = (w.states * doubled[:, None]).T.contiguous()
    biases = [b for b in (w.input_bias, w.state_bias) if b is not None]
    squashed = _map(x, w.inputs, sum(biases[1:], biases[0]) if biases else None).mul_(doubled)
    steps, rows = x.shape[:2]
    candidates, outputs = x.new_empty(2, steps, rows, size)
    cells = x.new_empty(steps + 1, rows, size)
    states = x.new_empty(steps, rows, first.shape[1])
    cells[0] = cell
    for t in range(steps):
        before = first if t == 0 else states[t - 1]
        i, f, n, o = squashed[t].addmm_(before, of_states).sigmoid_().view(rows, 4, size).unbind(1)
        n = torch.mul(n, 2, out=candidates[t]).sub_(1)
        torch.tanh(torch.mul(i, n, out=cells[t + 1]).addcmul_(f, cells[t]), out=outputs[t])
        if w.projection is None:
            torch.mul(o, outputs[t], out=states[t])
        else:
            torch.mm(o * outputs[t], w.projection.T, out=states[t])
    return states, Gates(squashed, candidates, cells, outputs)


def lstm(w: Weights, steps: Steps, g: Tensor, g_cell: Tensor | None) -> GateGradients:
    """Goes back through an LSTM (Hochreiter & Schmidhuber 1997), step by step to stay in cache.

    Args:
        w: Weights.
        steps: What the forward pass left.
        g: Gradient of the outputs [T, R, P], the last one including that of the last state.
        g_cell: Gradient of the last cell state [R, H].
    """
    kept = steps.gates
    if kept is None:
        assert steps.cell is not None
        kept = lstm_forward(w, steps.x, steps.before[0], steps.cell)[1]
    rows, size = kept.cells.shape[1:]
    back, outputs = torch.empty_like(kept.squashed), torch.empty_like(g)
    hidden = None if w.projection is None else torch.empty_like(kept.outputs)
    dh = torch.zeros_like(g[0])
    dc = torch.zeros_like(kept.cells[0]) if g_cell is None else g_cell.clone()
    for t in reversed(range(len(g))):
        i, f, _, o = kept.squashed[t].view(rows, 4, size).unbind(1)
        out, gates = kept.outputs[t], back[t].view(rows, 4, size)
        dh = torch.add(g[t], dh, out=outputs[t])
        du = dh if w.projection is None else dh @ w.projection
        if hidden is not None:
            torch.mul(o, out, out=hidden[t])
        dc.add_(_of_tanh(du * o, out))
        torch.mul(dc, kept.candidates[t], out=gates[:, 0])
        torch.mul(dc, kept.cells[t], out=gates[:, 1])
        torch.mul(dc, i, out=gates[:, 2])
        torch.mul(du, out, out=gates[:, 3])
        _of_sigmoid(back[t], kept.squashed[t], grad_input=back[t])
        gates[:, 2].mul_(4)  # tanh' = 4 sigmoid'(2 u)
        dh, dc = back[t] @ w.states, dc.mul_(f)
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


_of_sigmoid: Callable[..., Tensor] = torch.ops.aten.sigmoid_backward
_of_tanh: Callable[[Tensor, Tensor], Tensor] = torch.ops.aten.tanh_backward


BACKWARDS: Mapping[str, Callable[[Weights, Steps, Tensor, Tensor | None], GateGradients]] = {
    "lstm": lstm,
    "gru": gru,
    "rnn_tanh": _elman(_of_tanh),
    "rnn_relu": _elman(lambda g, h: g * (h > 0)),
}
"""How to go back, by the name of the torch function that goes forth."""
