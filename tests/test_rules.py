"""Rules on drawn shapes, in both engines that use them, against `Loop`: 1e-10 relative."""

import functools
from unittest import mock

import pytest
import torch
import zoo
from cases import squares
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from dpsgd import engines, rules
from dpsgd.engines.ghost import part
from dpsgd.engines.ghost.strategies import KNOWN
from dpsgd.rules import rows

ROUTES = [(1.0, 1.0), (0.0, 1e9), (0.0, -1.0)]
STRATEGIES = [name for name in KNOWN if name not in ("fastest", "lean")]
drawn = settings(max_examples=40, deadline=None)
small = st.integers(1, 3)


def check(layer, x, engine_classes=(engines.Hooks, engines.Ghost)):
    layer = layer.double()
    reference = engines.Loop(layer, squares)(x)
    expected = reference.materialize()
    scale = max([grad.abs().max().item() for grad in expected.values() if grad.numel()] + [1e-3])
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10 * scale)
    groups = [[name] for name in expected]
    weights = torch.linspace(-1, 1, len(x))
    for engine in engine_classes:
        for kept, gram in ROUTES if engine is engines.Ghost else ROUTES[:1]:
            with (
                mock.patch.object(part, "KEPT_SHARE", kept),
                mock.patch.object(rows, "GRAM_SHARE", gram),
            ):
                grads = engine(layer, squares)(x)
                close(grads.norms(groups), reference.norms(groups))
                close(grads.materialize(), expected)
                close(grads.weighted_sum(weights), reference.weighted_sum(weights))
                check_products(grads, reference)
    for strategy in STRATEGIES:
        grads = engines.Ghost(layer, squares, strategy=strategy)(x)
        close(grads.norms(groups), reference.norms(groups))
        close(grads.weighted_sum(weights), reference.weighted_sum(weights))


def check_products(grads, reference):
    direction = reference.weighted_sum(torch.ones(len(reference.losses)))
    close = functools.partial(torch.testing.assert_close, rtol=1e-10)
    expected = reference.gram()
    close(grads.gram(), expected, atol=1e-10 * max(expected.abs().max().item(), 1e-6))
    expected = reference.dot(direction)
    close(grads.dot(direction), expected, atol=1e-10 * max(expected.abs().max().item(), 1e-6))


@drawn
@given(data=st.data(), n=st.sampled_from([1, 2, 3]), size=small, bias=st.booleans())
def test_convolutions(data, n, size, bias):
    groups = data.draw(small)
    each = lambda strategy: tuple(data.draw(strategy) for _ in range(n))  # noqa: E731
    kernel, stride, dilation, space = each(small), each(small), each(small), each(st.integers(2, 6))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = data.draw(st.sampled_from(["same", "valid", "numbers"]))
    padding = each(st.integers(0, 1)) if padding == "numbers" else padding
    if padding == "same":
        stride = (1,) * n
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    layer = kind(
        groups * data.draw(small),
        groups * data.draw(small),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias,
        mode,
    )
    x = torch.randn(size, layer.in_channels, *space).double()
    if data.draw(st.booleans()):  # channels last in memory
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    if n == 2 and data.draw(st.booleans()):
        layer = layer.to(memory_format=torch.channels_last)
    try:
        layer.double()(x)
    except RuntimeError:  # kernel larger than the padded input
        assume(False)
    check(layer, x)


@drawn
@given(data=st.data(), n=st.sampled_from([1, 2, 3]), size=small, bias=st.booleans())
def test_transposed_convolutions(data, n, size, bias):
    groups = data.draw(small)
    each = lambda strategy: tuple(data.draw(strategy) for _ in range(n))  # noqa: E731
    kernel, stride, dilation = each(small), each(small), each(small)
    limits = [max(s, d) - 1 for s, d in zip(stride, dilation)]
    extra = tuple(data.draw(st.integers(0, limit)) for limit in limits)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    layer = kind(
        groups * data.draw(small),
        groups * data.draw(small),
        kernel,
        stride,
        each(st.integers(0, 1)),
        extra,
        groups,
        bias,
        dilation,
    )
    x = torch.randn(size, layer.in_channels, *each(small)).double()
    try:
        layer.double()(x)
    except RuntimeError:  # nothing is left of the output
        assume(False)
    check(layer, x)


@drawn
@given(size=small, dims=st.lists(small, max_size=3), d=small, p=small, bias=st.booleans())
def test_linear_of_any_number_of_dimensions(size, dims, d, p, bias):
    check(nn.Linear(d, p, bias), torch.randn(size, *dims, d).double())


@drawn
@given(size=small, dims=st.lists(small, max_size=2), a=small, b=small, p=small)
def test_bilinear(size, dims, a, b, p):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Bilinear(a, b, p)

        def forward(self, x):
            return self.layer(x[..., :a], x[..., a:])

    check(Both(), torch.randn(size, *dims, a + b).double())


@drawn
@given(
    size=small,
    length=st.integers(1, 6),
    vocabulary=st.integers(1, 6),
    pad=st.none() | st.integers(0, 5),
    mode=st.sampled_from(["embedding", "sum", "mean", "max"]),
)
def test_embeddings_with_repeated_ids(size, length, vocabulary, pad, mode):
    pad = None if pad is None else pad % vocabulary
    x = torch.randint(vocabulary, (size, length))
    if mode == "embedding":
        check(nn.Embedding(vocabulary, 3, padding_idx=pad), x)
    else:
        check(nn.EmbeddingBag(vocabulary, 3, mode=mode, padding_idx=pad), x)


@drawn
@given(size=small, lead=st.lists(small, max_size=2), shape=st.lists(small, min_size=1, max_size=2))
def test_layer_norms(size, lead, shape):
    x = torch.randn(size, *lead, *shape).double()
    check(nn.LayerNorm(shape), x)
    check(nn.RMSNorm(shape), x)


@drawn
@given(size=small, groups=small, each=small, space=st.lists(st.integers(2, 4), max_size=3))
def test_channel_norms(size, groups, each, space):
    assume(each > 1 or space)  # PyTorch refuses to normalise single values
    channels = groups * each
    x = torch.randn(size, channels, *space).double()
    check(nn.GroupNorm(groups, channels), x)
    if space:
        kind = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[len(space) - 1]
        check(kind(channels, affine=True), x)
        running = kind(channels, affine=True, track_running_stats=True).double()
        running(x * 2 + 1)
        check(running.eval(), x)


@drawn
@given(size=small, channels=small, space=st.lists(small, max_size=3), own=st.booleans())
def test_prelu(size, channels, space, own):
    check(nn.PReLU(channels if own else 1), torch.randn(size, channels, *space).double())


@drawn
@given(size=small, length=small, d=small, p=small, dims=st.lists(small, max_size=2))
def test_matrix_products(size, length, d, p, dims):
    def run(m, x):
        flat = torch.addmm(m.bias, x.reshape(-1, d), m.weight).view(*x.shape[:-1], p)
        return torch.cat([flat, x @ m.weight, torch.matmul(x, m.other.t())], -1)

    parts = {"bias": (p,), "weight": (d, p), "other": (p, d)}
    layer = zoo.Call(run, **{name: zoo.parameter(*shape) for name, shape in parts.items()})
    check(layer, torch.randn(size, length, *dims, d).double(), [engines.Ghost])


@drawn
@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    size=small,
    length=small,
    layers=st.integers(1, 2),
    both=st.booleans(),
    bias=st.booleans(),
    first=st.booleans(),
    projected=st.booleans(),
)
def test_recurrent_networks(kind, size, length, layers, both, bias, first, projected):
    options = {"proj_size": 2} if projected and kind is nn.LSTM else {}
    layer = zoo.recurrent(
        kind, num_layers=layers, bidirectional=both, bias=bias, batch_first=first, **options
    )
    check(layer, torch.randn(size, length, 4).double(), [engines.Ghost])


@drawn
@given(size=small, length=small, heads=small, each=small, masked=st.booleans(), bias=st.booleans())
def test_attention(size, length, heads, each, masked, bias):
    def run(m, x):
        mask = None
        if masked:
            mask = (x[..., 0] > 0) & (torch.arange(x.shape[1]) > 0)
        return m.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]

    attention = nn.MultiheadAttention(heads * each, heads, bias=bias, batch_first=True)
    x = torch.randn(size, length, heads * each).double()
    check(zoo.Call(run, attention=attention), x, [engines.Ghost])


@drawn
@given(size=small, ids=st.lists(small, max_size=2), rows=small, dims=st.lists(small, max_size=2))
def test_rows_picked_by_ids(size, ids, rows, dims):
    def run(m, x):
        picked = m.w[x].reshape(len(x), -1)
        return torch.cat([picked, m.w.index_select(0, x.flatten() % rows).view(len(x), -1)], 1)

    layer = zoo.Call(run, w=zoo.parameter(rows, *dims))
    check(layer, torch.randint(-rows, rows, (size, *ids)), [engines.Ghost])


def test_registering_twice_is_refused():
    class Other(type(rules.lookup(torch.prelu))):
        pass

    with pytest.raises(ValueError, match="second one"):
        rules.register(torch.prelu)(Other)
    with pytest.raises(ValueError, match="second one"):
        rules.register_layer(nn.Linear)(lambda module, input: None)
    rules.register(torch.prelu)(type(rules.lookup(torch.prelu)))  # a cell that runs twice


def test_names_that_are_no_arguments_are_refused():
    class Misnamed(type(rules.lookup(torch.prelu))):
        samples = ("inputs",)

    with pytest.raises(ValueError, match=r"Misnamed.*\['inputs'\]"):
        rules.register(torch.celu)(Misnamed)


def test_gradients_of_the_wrong_shape_are_named(monkeypatch):
    rule = type(rules.lookup(torch.prelu))
    monkeypatch.setattr(rule, "materialize", lambda self, call, name: call.g)
    with pytest.raises(ValueError, match=r"rule Prelu .*'weight' \(of 'weight'\)"):
        engines.Ghost(nn.PReLU(), squares)(torch.randn(3, 4)).norms()


def test_a_subclass_that_only_adds_a_constructor_keeps_its_description():
    class Square(nn.Linear):
        def __init__(self, width):
            super().__init__(width, width)

    assert rules.lookup_layer(Square(3)) is rules.lookup_layer(nn.Linear(3, 3))
    patched = Square(3)
    patched.forward = lambda x: x @ patched.weight
    assert rules.lookup_layer(patched) is None
