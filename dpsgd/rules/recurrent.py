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
    """Goes back through an LSTM (Hochreiter & Schmidhuber 1997).

    Args:
        w: Weights.
        steps: What the forward pass left.
        g: Gradient of the outputs [T, R, P], the last one including that of the last state.
        g_cell: Gradient of the last cell state [R, H].
    """
    i, f, n, o = _maps(w, steps).chunk(4, -1)
    i, f, n, o = i.sigmoid(), f.sigmoid(), n.tanh(), o.sigmoid()
    assert steps.cell is not None
    cells, added = [steps.cell], i * n
    for t in range(len(f)):
        cells.append(torch.addcmul(added[t], f[t], cells[-1]))
    c_before, squashed = torch.stack(cells[:-1]), torch.stack(cells[1:]).tanh()
    through = o * (1 - squashed.square())
    of_cell = torch.stack([n * i * (1 - i), c_before * f * (1 - f), i * (1 - n.square())], 2)
    of_output = squashed * o * (1 - o)
    gates = g.new_empty(*g.shape[:2], 4, i.shape[-1])
    outputs = torch.empty_like(g)
    dh, dc = torch.zeros_like(g[0]), torch.zeros_like(f[0]) if g_cell is None else g_cell
    for t in reversed(range(len(g))):
        dh = torch.add(g[t], dh, out=outputs[t])
        hidden = dh if w.projection is None else dh @ w.projection
        dc = torch.addcmul(dc, hidden, through[t])
        torch.mul(of_cell[t], dc[:, None], out=gates[t, :, :3])
        torch.mul(of_output[t], hidden, out=gates[t, :, 3])
        dh, dc = gates[t].flatten(1) @ w.states, dc * f[t]
    projection = None if w.projection is None else (o * squashed, outputs)
    gates = gates.flatten(2)
    return GateGradients(gates, gates, dh, dc, projection)


def gru(w: Weights, steps: Steps, g: Tensor, g_cell: Tensor | None) -> GateGradients:
    """Goes back through a GRU (Cho et al. 2014, arXiv:1406.1078) in PyTorch's form; see `lstm`."""
    r, z, n = _map(steps.x, w.inputs, w.input_bias).chunk(3, -1)
    r_state, z_state, n_state = _map(steps.before, w.states, w.state_bias).chunk(3, -1)
    r, z = (r + r_state).sigmoid(), (z + z_state).sigmoid()
    n = torch.addcmul(n, r, n_state).tanh()
    of_n = (1 - z) * (1 - n.square())
    of_z = (steps.before - n) * z * (1 - z)
    of_r = of_n * n_state * r * (1 - r)
    factors = torch.stack([of_r, of_z, of_n], 2)
    of_state = torch.stack([of_r, of_z, of_n * r], 2)
    outputs, gates = torch.empty_like(g), torch.empty_like(of_state)
    dh = torch.zeros_like(g[0])
    for t in reversed(range(len(g))):
        dh = torch.add(g[t], dh, out=outputs[t])
        torch.mul(of_state[t], dh[:, None], out=gates[t])
        dh = torch.addcmul(gates[t].flatten(1) @ w.states, dh, z[t])
    return GateGradients((factors * outputs[:, :, None]).flatten(2), gates.flatten(2), dh)


def _elman(
    slope: Callable[[Tensor], Tensor],
) -> Callable[[Weights, Steps, Tensor, Tensor | None], GateGradients]:
    def back(w: Weights, steps: Steps, g: Tensor, g_cell: Tensor | None) -> GateGradients:
        """Goes back through a simple recurrent network (Elman 1990); see `lstm`."""
        slopes, gates = slope(steps.after), torch.empty_like(g)
        dh = torch.zeros_like(g[0])
        for t in reversed(range(len(g))):
            torch.mul(g[t] + dh, slopes[t], out=gates[t])
            dh = gates[t] @ w.states
        return GateGradients(gates, gates, dh)

    return back


BACKWARDS: Mapping[str, Callable[[Weights, Steps, Tensor, Tensor | None], GateGradients]] = {
    "lstm": lstm,
    "gru": gru,
    "rnn_tanh": _elman(lambda h: 1 - h.square()),
    "rnn_relu": _elman(lambda h: (h > 0).to(h.dtype)),
}
"""How to go back, by the name of the torch function that goes forth."""


def _maps(w: Weights, steps: Steps) -> Tensor:
    """The gates before their nonlinearities, of all steps."""
    return _map(steps.x, w.inputs, w.input_bias) + _map(steps.before, w.states, w.state_bias)


def _map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)
