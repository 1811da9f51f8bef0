"""Models for the table of cases: what people write, and what breaks engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint


class Call(nn.Module):
    """A module around a function of itself and the input, with the given children."""

    def __init__(self, function: Callable[[Any, Any], Any], **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 3)


def self_attention(mask: bool = False, **options: Any) -> nn.Module:
    """nn.MultiheadAttention on itself, with the weights it attends with."""

    def run(m: Any, x: Tensor) -> Tensor:
        padding = x[..., 0] > 1.0 if mask else None
        padding = padding & (torch.arange(x.shape[1]) > 0) if mask else None
        out, weights = m.attention(x, x, x, key_padding_mask=padding)
        return torch.cat([out, weights], -1)

    return Call(run, attention=nn.MultiheadAttention(4, 2, batch_first=True, **options))


def cross_attention() -> nn.Module:
    return Call(
        lambda m, x: m.attention(x, x[..., :3], x[..., 1:], need_weights=False)[0],
        attention=nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=3),
    )


def causal_attention() -> nn.Module:
    """Time-major attention with a mask that all samples share."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(x), dtype=x.dtype)
        return m.attention(x, x, x, attn_mask=mask, need_weights=False)[0].transpose(0, 1)

    return Call(run, attention=nn.MultiheadAttention(4, 2))


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def padded_encoder() -> nn.Module:
    """An encoder with a padding mask that differs from sample to sample."""

    def run(m: Any, ids: Tensor) -> Tensor:
        padding = (ids == 0) & (torch.arange(ids.shape[1]) > 0)
        return m.body(m.tokens(ids), src_key_padding_mask=padding)

    return Call(run, tokens=nn.Embedding(7, 4, padding_idx=0), body=encoder())


def encoder_decoder() -> nn.Module:
    return Call(
        lambda m, x: m.body(x, x[:, :2].flip(1)),
        body=nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=True),
    )


def recurrent(kind: type[nn.RNNBase], **options: Any) -> nn.Module:
    """Outputs and last states of a recurrent network."""

    def run(m: Any, x: Tensor) -> Tensor:
        out, last = m.rnn(x if m.rnn.batch_first else x.transpose(0, 1))
        last = last if isinstance(last, tuple) else (last,)
        out = out if m.rnn.batch_first else out.transpose(0, 1)
        return torch.cat([y.flatten(1) for y in (out, *(h.transpose(0, 1) for h in last))], 1)

    return Call(run, rnn=kind(4, 3, **options))


def stateful_lstm() -> nn.Module:
    """Learned initial states that all samples share."""

    def run(m: Any, x: Tensor) -> Tensor:
        states = tuple(s.expand(1, len(x), -1).contiguous() for s in (m.h, m.c))
        return m.rnn(x, states)[0]

    return Call(
        run, rnn=nn.LSTM(4, 3, batch_first=True), h=parameter(1, 1, 3), c=parameter(1, 1, 3)
    )


def packed(kind: type[nn.RNNBase], **options: Any) -> nn.Module:
    """Sequences of different lengths, packed."""

    def run(m: Any, ids: Tensor) -> Tensor:
        lengths = ids[:, 0] % 3 + 1
        x = pack_padded_sequence(m.tokens(ids), lengths, batch_first=True, enforce_sorted=False)
        out, last = m.rnn(x)
        out, _ = pad_packed_sequence(out, batch_first=True, total_length=ids.shape[1])
        last = last[0] if isinstance(last, tuple) else last
        return torch.cat([out.flatten(1), last.transpose(0, 1).flatten(1)], 1)

    return Call(run, tokens=nn.Embedding(7, 4), rnn=kind(4, 3, batch_first=True, **options))


def cells(kind: type[nn.RNNCellBase]) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
        return torch.cat(state, 1) if isinstance(state, tuple) else state

    return Call(run, cell=kind(4, 3))


def linear_recurrence() -> nn.Module:
    """A recurrent network written by hand: two layers used at each step."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = torch.tanh(m.inputs(x[:, t]) + m.states(h))
        return h

    return Call(run, inputs=nn.Linear(4, 3), states=nn.Linear(3, 3, bias=False))


def vision_transformer() -> nn.Module:
    """Patches by a strided convolution, a class token, learned positions."""

    def run(m: Any, x: Tensor) -> Tensor:
        patches = m.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([m.token.expand(len(x), -1, -1), patches], 1) + m.positions
        return m.head(m.body(tokens)[:, 0])

    return Call(
        run,
        patches=nn.Conv2d(2, 4, 2, stride=2),
        token=parameter(1, 1, 4),
        positions=parameter(1, 5, 4),
        body=encoder(),
        head=nn.Linear(4, 3),
    )


def conv1d_of_gpt2() -> nn.Module:
    """An affine map of the flattened batch [B * T, d]."""

    def run(m: Any, x: Tensor) -> Tensor:
        flat = torch.addmm(m.bias, x.view(-1, x.shape[-1]), m.weight)
        return flat.view(*x.shape[:-1], -1)

    return Call(run, weight=parameter(4, 3), bias=parameter(3))


def flattened_either_way() -> nn.Module:
    """[B * T] and [T * B] look alike."""

    def run(m: Any, x: Tensor) -> Tensor:
        size, length, _ = x.shape
        first = m.first(x.reshape(size * length, -1)).view(size, length, -1)
        second = m.second(x.transpose(0, 1).reshape(length * size, -1))
        return first + second.view(length, size, -1).transpose(0, 1)

    return Call(run, first=nn.Linear(4, 3), second=nn.Linear(4, 3))


def frames() -> nn.Module:
    """A convolution on the frames of clips, time folded into the batch."""

    def run(m: Any, x: Tensor) -> Tensor:
        size, steps = x.shape[:2]
        y = m.norm(m.conv(x.flatten(0, 1))).relu()
        return m.slopes(y).view(size, steps, -1)

    return Call(run, conv=nn.Conv2d(2, 4, 2), norm=nn.GroupNorm(2, 4), slopes=nn.PReLU(4))


def without_batch() -> nn.Module:
    """Layers that take a sample without its batch dimension."""

    def run(m: Any, x: Tensor) -> Tensor:
        rows = [m.linear(m.conv(row).flatten()) for row in x.unbind()]
        return torch.stack(rows)

    return Call(run, conv=nn.Conv2d(2, 3, 2), linear=nn.Linear(12, 3))


def products() -> nn.Module:
    """Matrices as they are multiplied by hand."""

    def run(m: Any, x: Tensor) -> Tensor:
        a = x @ m.a
        b = torch.matmul(x, m.b.t())
        c = torch.einsum("btd,dp->btp", x, m.c)
        d = (m.d @ x.transpose(1, 2)).transpose(1, 2)
        e = torch.tensordot(x, m.e, 1)
        f = torch.baddbmm(m.f, x, m.g.expand(len(x), -1, -1))
        return torch.cat([a, b, c, d, e, f], -1)

    names = {"a": (4, 3), "b": (3, 4), "c": (4, 3), "d": (3, 4), "e": (4, 3), "f": (3,)}
    return Call(run, **{n: parameter(*shape) for n, shape in names.items()}, g=parameter(4, 3))


def elementwise() -> nn.Module:
    """Parameters added, multiplied, divided by, as powers, in a where, and written into place."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = (x + m.a) * m.b / (1 + m.c.exp()) - m.d
        y = torch.where(x > 0, y, m.e * y)
        y = torch.lerp(y, m.f, 0.3) ** 2 + torch.addcmul(y, m.a, m.b)
        y[:, 0] = m.g
        y += m.h[0]
        return y

    shapes = [(4,), (3, 1), (4,), (1,), (), (3, 4), (4,), (2, 4)]
    return Call(run, **{n: parameter(*shape) for n, shape in zip("abcdefgh", shapes)})


def slices() -> nn.Module:
    """Parts of one parameter in several places, some of them overlapping."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, w) for w in m.w.chunk(3))
        return q * k + v + F.linear(x, m.w[1:5]) + m.w[0] + F.linear(x, m.w[:4, :2] @ m.w[:2])

    return Call(run, w=parameter(12, 4))


def tied_transposed() -> nn.Module:
    """An embedding that is also a head, by its module and by hand."""

    def run(m: Any, ids: Tensor) -> Tensor:
        x = torch.tanh(m.tokens(ids))
        return x @ m.tokens.weight.t() + F.linear(x * 2, m.tokens.weight)

    return Call(run, tokens=nn.Embedding(7, 4, padding_idx=1))


def tied_convolution() -> nn.Module:
    """A kernel used forwards, transposed and as a matrix."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.tanh(m.conv(x))
        back = F.conv_transpose2d(y, m.conv.weight)
        flat = F.linear(x.flatten(1)[:, :12], m.conv.weight.view(3, -1)[:, :12].contiguous())
        return torch.cat([back.flatten(1), flat], 1)

    return Call(run, conv=nn.Conv2d(3, 3, 2))


class StandardisedConv(nn.Conv2d):
    """A convolution whose weight is standardised (Qiao et al. 2019, arXiv:1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, w, self.bias)


def weight_normed(recurrent_too: bool = False) -> nn.Module:
    norm = nn.utils.parametrizations.weight_norm
    if recurrent_too:
        return Call(
            lambda m, x: m.rnn(x)[0], rnn=norm(nn.LSTM(4, 3, batch_first=True), "weight_hh_l0")
        )
    return nn.Sequential(norm(nn.Conv1d(4, 3, 2)), nn.Tanh(), norm(nn.Linear(4, 3)))


def spectral_normed() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval()


class LowRank(nn.Module):
    """A frozen map with a low-rank update (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.down, self.up = parameter(2, 4), parameter(3, 2)
        self.merged = merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def hyper_network() -> nn.Module:
    """Weights that are computed from each sample, added to shared ones."""

    def run(m: Any, x: Tensor) -> Tensor:
        delta = m.hyper(x.mean(1)).view(len(x), 3, 4)
        return torch.einsum("btd,bpd->btp", x, m.w + delta) + F.linear(x, m.w)

    return Call(run, hyper=nn.Linear(4, 12), w=parameter(3, 4))


def mixture() -> nn.Module:
    """Every expert for every sample, weighted by a gate."""

    def run(m: Any, x: Tensor) -> Tensor:
        gate = m.gate(x).softmax(-1)
        return torch.stack([expert(x) for expert in m.experts], -1) @ gate[..., None]

    experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
    return Call(run, gate=nn.Linear(4, 2), experts=experts)


def branches() -> nn.Module:
    """Control flow that depends on the sample."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.first(x) if (x.sum() > 0).all() else m.second(x)
        for _ in range(int(x.abs().max().clamp(max=3).ceil())):
            y = torch.tanh(m.again(y))
        return y

    return Call(run, first=nn.Linear(4, 3), second=nn.Linear(4, 3), again=nn.Linear(3, 3))


def buffers_written() -> nn.Module:
    """Tensors made without the samples, into which they are written."""

    def run(m: Any, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], x.shape[1], 3, dtype=x.dtype)
        for t in range(x.shape[1]):
            out[:, t] = m.layer(x[:, t])
        total = torch.zeros(x.shape[0], 3, dtype=x.dtype)
        total += out.sum(1)
        return torch.cat([out.flatten(1), total], 1)

    return Call(run, layer=nn.Linear(4, 3))


def checkpointed(nested: bool = False) -> nn.Module:
    def block(m: Any, x: Tensor) -> Tensor:
        inner = lambda y: m.second(torch.tanh(m.first(y) * m.scale))  # noqa: E731
        return checkpoint(inner, x, use_reentrant=False) if nested else inner(x)

    def run(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + checkpoint(block, m, x, use_reentrant=False)
        return m.head(x)

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    return Call(run, first=nn.Linear(4, 6), scale=parameter(6), second=normed, head=nn.Linear(4, 2))


def state_space() -> nn.Module:
    """A selective scan in the manner of Mamba (Gu & Dao 2023, arXiv:2312.00752), step by step."""

    def run(m: Any, x: Tensor) -> Tensor:
        u, gate = m.inputs(x).chunk(2, -1)
        u = F.silu(m.conv(u.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        delta, b, c = m.select(u).split([4, 2, 2], -1)
        decay = torch.exp(F.softplus(delta + m.bias)[..., None] * -torch.exp(m.a))
        state, out = 0, []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + u[:, t, :, None] * b[:, t, None]
            out.append((state * c[:, t, None]).sum(-1) + m.d * u[:, t])
        return m.outputs(torch.stack(out, 1) * F.silu(gate))

    return Call(
        run,
        inputs=nn.Linear(4, 8),
        conv=nn.Conv1d(4, 4, 3, padding=2, groups=4),
        select=nn.Linear(4, 8),
        bias=parameter(4),
        a=parameter(4, 2),
        d=parameter(4),
        outputs=nn.Linear(4, 4),
    )


def spectral_filter() -> nn.Module:
    """A learned filter in the frequency domain: complex weights (Li et al. 2020)."""

    def run(m: Any, x: Tensor) -> Tensor:
        filtered = torch.fft.rfft(x, dim=1) * torch.view_as_complex(m.filter)
        return torch.fft.irfft(filtered, n=x.shape[1], dim=1)

    return Call(run, filter=parameter(3, 4, 2))


def rms_by_hand() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + m.scale))

    return Call(run, scale=parameter(4), head=nn.Linear(4, 3))


def nested_transform() -> nn.Module:
    """A layer mapped over positions by torch.vmap, inside the model."""
    return Call(
        lambda m, x: torch.vmap(torch.vmap(lambda row: torch.tanh(m.layer(row)) * m.scale))(x),
        layer=nn.Linear(4, 3),
        scale=parameter(3),
    )


def rotary_attention() -> nn.Module:
    """Grouped queries, rotary positions, a causal mask: attention in the manner of Llama."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def run(m: Any, x: Tensor) -> Tensor:
        size, length, _ = x.shape
        angles = torch.arange(length, dtype=x.dtype)[:, None] / torch.tensor([1.0, 10.0] * 2)
        cos, sin = angles.to(x.dtype).cos(), angles.to(x.dtype).sin()
        q = m.q(x).view(size, length, 4, 4).transpose(1, 2)
        k, v = m.kv(x).view(size, length, 2, 8).transpose(1, 2).chunk(2, -1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return m.out(y.transpose(1, 2).reshape(size, length, -1))

    return Call(
        run, q=nn.Linear(8, 16, bias=False), kv=nn.Linear(8, 16), out=nn.Linear(16, 8, bias=False)
    )


def relative_positions() -> nn.Module:
    """Attention with a learned bias per distance, looked up without the samples (as in T5)."""

    def run(m: Any, x: Tensor) -> Tensor:
        length = x.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        bias = m.bias(distance.clamp(-1, 1) + 1).permute(2, 0, 1)[None]
        q, k, v = m.qkv(x).view(len(x), length, 2, 6).transpose(1, 2).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

    return Call(run, bias=nn.Embedding(3, 2), qkv=nn.Linear(4, 12))


def everything() -> nn.Module:
    """Every feature at once."""

    def run(m: Any, ids: Tensor) -> Tensor:
        size, length = ids.shape
        x = m.tokens(ids) + m.positions(torch.arange(length)[None])
        x = torch.cat([m.token.expand(size, -1, -1), x], 1)
        x = x + checkpoint(m.body, x, use_reentrant=False)
        x = x + m.mixer(m.norm(x).transpose(1, 2)).transpose(1, 2)[:, : x.shape[1]]
        if (ids > 3).any():
            x = x + m.recurrent(x)[0][..., :3]
        x = F.relu(m.low_rank(x), inplace=True) * m.scale
        pooled = x.mean(1) if len(x) == 0 else math.sqrt(2) * x.mean(1)
        return m.head(pooled) + F.linear(pooled, m.tokens.weight)

    tokens = nn.Embedding(7, 3, padding_idx=0)
    head = nn.Linear(3, 7)
    head.weight = tokens.weight
    body = nn.TransformerEncoderLayer(3, 1, 5, dropout=0.0, batch_first=True, norm_first=True)
    return Call(
        run,
        tokens=tokens,
        positions=nn.Embedding(9, 3),
        token=parameter(1, 1, 3),
        body=body,
        norm=nn.LayerNorm(3),
        mixer=nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 3, 2, padding=1)),
        recurrent=nn.LSTM(3, 2, bidirectional=True, batch_first=True),
        low_rank=nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3)),
        scale=parameter(3),
        head=head,
    )
