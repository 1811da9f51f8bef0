"""Recurrent networks: PyTorch's own kernels forwards, tapped linear maps backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsgd import rules
from dpsgd.engines.ghost.arguments import is_weight
from dpsgd.engines.ghost.capture import Capture
from dpsgd.engines.ghost.physical import apply_plainly, is_wrapped, outside_vmap
from dpsgd.engines.ghost.tape import Site, Tape
from dpsgd.rules.recurrent import BACKWARDS, Gates, Steps, Weights, lstm_forward


@dataclass(frozen=True)
class Network:
    """A call of torch.lstm and its like, on sequences [steps, n, d] of one sample.

    Attributes:
        kind: The name of the function.
        x: Inputs [T, n, d].
        states: Initial states [layers * directions, n, ...], an LSTM's cell states second.
        weights: Flat list of weights, as PyTorch passes them.
    """

    kind: str
    x: Tensor
    states: Sequence[Tensor]
    weights: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool

    def layers(self) -> Iterator[list[Tensor]]:
        """Yields the weights of each direction of each layer, in the order of the states."""
        each = len(self.weights) // (self.num_layers * (1 + self.bidirectional))
        for start in range(0, len(self.weights), each):
            yield list(self.weights[start : start + each])


def _treat(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """torch.lstm, gru, rnn_tanh and rnn_relu, in their padded and their packed form."""
    kind = func.__name__
    packed = isinstance(args[1], Tensor) and isinstance(args[2], Tensor | tuple | list)
    packed = packed and isinstance(args[3], tuple | list)
    tensors = [x for arg in args for x in (arg if isinstance(arg, tuple | list) else [arg])]
    held = [x for x in tensors if isinstance(x, Tensor) and is_wrapped(x)]
    if not held:
        return capture.call(func, args, kwargs)
    if any(is_wrapped(w) for w in (args[3] if packed else args[2])):
        raise ValueError(
            f"Expected the weights of {kind} to be the same for all samples, got some that are "
            "computed from samples. Use engine=loop."
        )
    x, hx, weights, *options = (args[0], *args[2:]) if packed else args
    states = list(hx) if kind == "lstm" else [hx]
    batch_first = False if packed else options.pop()
    each = _each(args[1]) if packed else 0
    x = capture.samples.enter(capture.expand(x))
    states = [capture.samples.enter(capture.expand(h)) for h in states]
    with outside_vmap():
        x = x.unflatten(1, (-1, each)) if packed else x
        x = x.permute(2, 0, 1, 3) if batch_first else x.transpose(0, 1)  # [T, B, n, d]
        size, n = x.shape[1:3]
        states = [h.transpose(0, 1).flatten(1, 2) for h in states]  # [layers, B n, h]
        network = Network(kind, x.flatten(1, 2), states, weights, *options)
        out, last = _run(capture, network, size)
        out = out.unflatten(1, (size, n))
        out = out.permute(1, 2, 0, 3) if batch_first else out.transpose(0, 1)
        out = out.flatten(1, 2) if packed else out
        last = [h.unflatten(1, (size, n)).transpose(0, 1) for h in last]
    return tuple(capture.samples.leave(y) for y in (out, *last))


def _run(capture: Capture, network: Network, size: int) -> tuple[Tensor, list[Tensor]]:
    """Runs all layers; returns outputs [T, R, p] and last states [layers, R, h]."""
    x, last, directions = network.x, [], 1 + network.bidirectional
    weights = list(network.layers())
    for layer in range(network.num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            states = [h[index] for h in network.states]
            inputs = x.flip(0) if direction else x
            out, *ends = _direction(capture, network, weights[index], inputs, states, size)
            outputs.append(out.flip(0) if direction else out)
            last.append(ends)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if network.dropout and network.train and layer + 1 < network.num_layers:
            x = F.dropout(x, network.dropout)
    return x, [torch.stack(ends) for ends in zip(*last)]


def _direction(
    capture: Capture,
    network: Network,
    given: list[Tensor],
    x: Tensor,
    states: list[Tensor],
    size: int,
) -> tuple[Tensor, ...]:
    bare = [w.detach() for w in given]
    has_biases, projected = network.has_biases, len(given) in (3, 5)
    weights = Weights(
        bare[0],
        bare[1],
        bare[2] if has_biases else None,
        bare[3] if has_biases else None,
        bare[-1] if projected else None,
    )
    given_biases = given[2:4] if has_biases else [None, None]
    maps = [
        _site(capture, weight, bias)
        for weight, bias in (
            (given[0], given_biases[0]),
            (given[1], given_biases[1]),
            (given[-1] if projected else None, None),
        )
    ]
    cell = states[1] if len(states) > 1 else None
    return apply_plainly(
        _Direction,
        x,
        states[0],
        cell,
        capture.tape.anchor if any(maps) else None,
        capture.tape,
        network.kind,
        weights,
        maps,
        size,
    )


def _site(capture: Capture, weight: Tensor | None, bias: Tensor | None) -> Site | None:
    """Where a linear map is noted; None where nothing of it is wanted."""
    arguments = {"weight": weight, "bias": bias}
    wanted = tuple(name for name, value in arguments.items() if is_weight(value))
    if not wanted or not torch.is_grad_enabled():
        return None
    rule = rules.lookup(F.linear)
    assert rule is not None
    return capture.tape.site(rule, arguments, ("input",), wanted)


class _Direction(torch.autograd.Function):
    """One layer in one direction: x [T, R, d], states [R, h] -> outputs [T, R, p], last states."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        c: Tensor | None,
        anchor: Tensor | None,
        tape: Tape,
        kind: str,
        weights: Weights,
        sites: list[Site | None],
        size: int,
    ) -> tuple[Tensor, ...]:
        ctx.tape, ctx.kind, ctx.weights, ctx.sites, ctx.size = tape, kind, weights, sites, size
        if c is not None and _plain(x, h, c, weights.inputs):
            out, gates = lstm_forward(weights, x, h, c)
            ctx.save_for_backward(
                x, h, c, out, gates.squashed, gates.candidates, gates.cells, gates.outputs
            )
            return out, out[-1].clone(), gates.cells[-1].clone()
        first = h[None] if c is None else (h[None].contiguous(), c[None].contiguous())
        options = (weights.input_bias is not None, 1, 0.0, False, False, False)
        out, *last = getattr(torch, kind)(x, first, weights.flat(), *options)
        ctx.save_for_backward(x, h, c, out)
        return out, *(end[0] for end in last)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *g_last: Tensor) -> tuple[Tensor | None, ...]:
        x, h, c, out, *kept = ctx.saved_tensors
        dtype = ctx.weights.inputs.dtype
        before = torch.cat([h[None], out[:-1]]).to(dtype)
        cell = None if c is None else c.to(dtype)
        g = g.to(dtype, copy=True)
        g[-1] += g_last[0]
        g_cell = g_last[1].to(dtype) if len(g_last) > 1 else None
        steps = Steps(x.to(dtype), before, out.to(dtype), cell, Gates(*kept) if kept else None)
        plain = torch.autocast(g.device.type, enabled=False)
        with torch.no_grad(), torch._C.DisableTorchFunction(), plain:
            back = BACKWARDS[ctx.kind](ctx.weights, steps, g, g_cell)
            gates = _by_sample(back.inputs, ctx.size)
            again = back.states is back.inputs
            gates_of_states = gates if again else _by_sample(back.states, ctx.size)
            maps = [(steps.x, gates), (before, gates_of_states)]
            if back.projection is not None:
                maps.append((back.projection[0], _by_sample(back.projection[1], ctx.size)))
            for site, (a, g_map) in zip(ctx.sites, maps):
                if site is not None:
                    ctx.tape.note(site, (_by_sample(a, ctx.size),), g_map)
            dx = (back.inputs @ ctx.weights.inputs).to(x.dtype)
        dc = None if c is None or back.cell is None else back.cell.to(c.dtype)
        return dx, back.first.to(h.dtype), dc, None, None, None, None, None, None


def _plain(*tensors: Tensor) -> bool:
    """Whether tensors are of one precision that computations are carried out in."""
    first = tensors[0]
    plain = first.dtype in (torch.float32, torch.float64)
    autocast = torch.is_autocast_enabled(first.device.type)
    return plain and not autocast and all(x.dtype == first.dtype for x in tensors)


def _by_sample(x: Tensor, size: int) -> Tensor:
    """[T, B n, d] as [B, T n, d]."""
    return x.unflatten(1, (size, -1)).movedim(1, 0).flatten(1, 2)


def _each(batch_sizes: Tensor) -> int:
    """The number of sequences in a packed batch, all of one length.

    Raises:
        ValueError: If they are of several lengths.
    """
    each = int(batch_sizes[0])
    if int(batch_sizes[-1]) != each:
        raise ValueError(
            "Expected packed sequences of one length within a sample, got several. Use engine=loop."
        )
    return each


def _cell(
    capture: Capture, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """torch.lstm_cell and its like, by their linear maps, which are captured in turn."""
    names = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
    given = {"b_ih": None, "b_hh": None, **dict(zip(names, args)), **kwargs}
    x, hx = given["input"], given["hx"]
    with capture:
        state = hx[0] if func is torch.lstm_cell else hx
        of_input = F.linear(x, given["w_ih"], given["b_ih"])
        of_state = F.linear(state, given["w_hh"], given["b_hh"])
        if func is torch.lstm_cell:
            i, f, n, o = (of_input + of_state).chunk(4, -1)
            c = f.sigmoid() * hx[1] + i.sigmoid() * n.tanh()
            return o.sigmoid() * c.tanh(), c
        if func is torch.gru_cell:
            (r, z, n), (r_s, z_s, n_s) = of_input.chunk(3, -1), of_state.chunk(3, -1)
            n = (n + (r + r_s).sigmoid() * n_s).tanh()
            return n + (z + z_s).sigmoid() * (state - n)
        gates = of_input + of_state
        return gates.tanh() if func is torch.rnn_tanh_cell else gates.relu()


TREATMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _treat),
    **dict.fromkeys(
        (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _cell
    ),
}
