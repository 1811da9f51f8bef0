"""What once made the ghost engine silently wrong, or refuse what people write: exact now."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import zoo
from cases import squares
from test_ghost import agree, batch
from torch import nn

from dpsgd import clipping
from dpsgd.engines import Ghost, Loop
from dpsgd.rules import rows

Linear, P, Call = nn.Linear, zoo.parameter, zoo.Call
COMPLEX = torch.complex128


def transform(m, x):
    return torch.func.grad(lambda z: m.a(z).square().sum())(x)


def asks_for_a_gradient(m, x):
    h = m.a(x)
    return h * 2 if h.requires_grad and h.grad_fn is not None and not h.is_leaf else h


def reverses_a_gradient(m, x):
    h = m.a(x)
    h.register_hook(lambda g: -g / (1 + g.norm()))
    return m.b(torch.tanh(h))


def changes_a_computed_weight(m, x):
    w = m.w * 1
    y = x + w
    w.add_(m.v)
    return torch.tanh(y + x * w)


def changes_a_computed_matrix(m, x):
    w = m.a.weight * 1
    y = F.linear(x, w)
    w = w.clone()
    w.mul_(2)
    return y + F.linear(x, w)


def adds_samples_to_a_weight(m, x):
    y = m.c.clone()
    y = y + torch.zeros(len(x), 4, dtype=x.dtype)
    y += torch.tanh(m.a(x))
    z = m.c.clone()
    z.add_(m.a(x)[0])
    return torch.cat([torch.tanh(y), torch.tanh(z)[None].expand(len(x), -1)], 1)


def puts_samples_behind_a_class_token(m, x):
    tokens = m.token.expand(len(x), 4, 4).clone()
    tokens[:, 1:] = x
    return m.a(torch.tanh(tokens))


def starts_from_a_template(m, x):
    out = torch.arange(4, dtype=x.dtype).clone()
    out += m.a(x)[0]
    return out[None]


def samples_latents(m, x):
    noise = torch.empty(4, dtype=x.dtype).normal_().mul_(0)
    return m.a(x) + noise


def writes_states_of_a_gru(m, x):
    return torch.zeros(len(x), 3, 3, dtype=x.dtype).add_(m.rnn(x)[0])


def complex_product(m, x):
    return torch.view_as_real(x.to(COMPLEX) @ torch.view_as_complex(m.w))


def fixed_projection(m, x):
    made = torch.Generator().manual_seed(3)
    return m.a(x) @ torch.randn(4, 4, generator=made, dtype=x.dtype)


def looks_up(m, x):
    ids = (x[:, :3].abs() * 10).long() % 5
    picked = m.w[ids - 5].flatten(1) + m.w.index_select(0, ids[0]).flatten()
    return picked + m.w[ids[0, 0], None, :1] * m.w[1:3][ids[:, :2] % 2, 0].sum()


def contains(m, x):
    return m.a(x) if (3 in x.long() or -2 in x.long()) else m.b(x)


def cuts_to_a_length(m, x):
    return F.pad(m.a(x)[:, : (x[0, 0] > 0).long() + 1], (0, 3))[:, :3]


def compares(m, x):
    return m.a(x) if torch.allclose(x, other=x.abs()) or torch.equal(x, x.abs()) else m.b(x)


def catches_everything(m, x):
    try:
        if x.sum() > 0:
            return m.a(x)
    except BaseException:
        pass
    return m.b(x)


def rolls_a_number(m, x):
    return (x.sum() * m.w[0]).roll(1)[None, None]


def shared_bias(m, x):
    return F.linear(m.a(x), m.b.weight, m.a.bias[:3]) + F.linear(x, m.c, m.b.bias)


MODELS = {
    "torch.func.grad": (transform, {"a": Linear(4, 3)}),
    "requires_grad": (asks_for_a_gradient, {"a": Linear(4, 4)}),
    "gradient_hook": (reverses_a_gradient, {"a": Linear(4, 4), "b": Linear(4, 2)}),
    "weight_changed": (changes_a_computed_weight, {"w": P(4), "v": P(4)}),
    "matrix_changed": (changes_a_computed_matrix, {"a": Linear(4, 4)}),
    "samples_into_weight": (adds_samples_to_a_weight, {"a": Linear(4, 4), "c": P(4)}),
    "template": (starts_from_a_template, {"a": Linear(4, 4)}),
    "latents": (samples_latents, {"a": Linear(4, 4)}),
    "scalar_bias": (lambda m, x: F.linear(x, m.w, m.b), {"w": P(3, 4), "b": P(1)}),
    "scalar_addmm": (lambda m, x: torch.addmm(m.b, x, m.w), {"w": P(4, 3), "b": P(1)}),
    "vector_weight": (lambda m, x: F.linear(x, m.w)[:, None], {"w": P(4)}),
    "generator": (fixed_projection, {"a": Linear(4, 4)}),
    "index": (looks_up, {"w": P(5, 2)}),
    "contains": (contains, {"a": Linear(4, 4), "b": Linear(4, 4)}),
    "slice": (cuts_to_a_length, {"a": Linear(4, 4)}),
    "compare": (compares, {"a": Linear(4, 4), "b": Linear(4, 4)}),
    "catch": (catches_everything, {"a": Linear(4, 4), "b": Linear(4, 4)}),
    "roll": (rolls_a_number, {"w": P(1)}),
    "shared_bias": (shared_bias, {"a": Linear(4, 4), "b": Linear(4, 3), "c": P(3, 4)}),
    "channels_last": (
        lambda m, x: m.a(x.view(len(x), 1, 2, 2).to(memory_format=torch.channels_last)),
        {"a": nn.Conv2d(1, 2, 2)},
    ),
    "data": (lambda m, x: m.a(x) * m.a(x).data, {"a": Linear(4, 4)}),
    "empty_table": (
        lambda m, x: torch.cat([m.a(x), m.e(x.long() * 0).sum(1)], 1),
        {"a": Linear(4, 4), "e": nn.Embedding(7, 0)},
    ),
    "gaussian_nll": (
        lambda m, x: F.gaussian_nll_loss(m.a(x), x, m.b(x).exp(), reduction="none"),
        {"a": Linear(4, 4), "b": Linear(4, 4)},
    ),
    "distance": (
        lambda m, x: F.triplet_margin_with_distance_loss(
            x,
            x + 1,
            x * 2,
            distance_function=lambda a, b: m.a(a - b).square().sum(-1) + 0.1,
            reduction="none",
        )[:, None],
        {"a": Linear(4, 3)},
    ),
}


@pytest.mark.parametrize("size", [5, 1])
@pytest.mark.parametrize("name", MODELS)
def test_it_agrees_with_loop(name, size):
    run, parts = MODELS[name]
    agree(copy.deepcopy(Call(run, **parts)).double(), squares, batch(size, 4))


SEQUENCES = {
    "class_token": (puts_samples_behind_a_class_token, {"a": Linear(4, 3), "token": P(1, 1, 4)}),
    "gru_into_zeros": (writes_states_of_a_gru, {"rnn": nn.GRU(4, 3, batch_first=True)}),
    "lstm_into_zeros": (writes_states_of_a_gru, {"rnn": nn.LSTM(4, 3, batch_first=True)}),
    "complex": (complex_product, {"w": P(4, 3, 2)}),
    "select_scatter": (lambda m, x: torch.select_scatter(x, m.w[None], 1, 0), {"w": P(4)}),
}


@pytest.mark.parametrize("size", [5, 1])
@pytest.mark.parametrize("name", SEQUENCES)
def test_it_agrees_with_loop_on_sequences(name, size):
    run, parts = SEQUENCES[name]
    agree(copy.deepcopy(Call(run, **parts)).double(), squares, batch(size, 3, 4))


def test_a_path_that_is_taken_later_is_checked_too():
    from test_ghost import Doubled

    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w, self.calls = nn.Linear(4, 4), P(4), 0

        def forward(self, x):
            self.calls += 1
            scripted = self.calls > 1
            return Doubled.apply(self.a(x), self.w) if scripted else self.a(x) * self.w

    engine = Ghost(Later(), squares)
    engine(torch.randn(3, 4))
    with pytest.raises(ValueError, match="engine=loop"):
        engine(torch.randn(3, 4))


@torch.jit.script
def scripted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * w


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w = nn.Linear(4, 4), P(4)

    def forward(self, x):
        return scripted(self.a(x), self.w)


def test_a_scripted_function_is_refused_however_warm_it_is():
    for _ in range(3):
        with pytest.raises(ValueError, match=r"TorchScript.*Scripted"):
            Ghost(Scripted(), squares)(torch.randn(5, 4))


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_modules_are_refused(kind):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    getattr(model[1], kind)(lambda module, *grads: None)
    with pytest.raises(ValueError, match=r"backward hooks.*'1'"):
        Ghost(model, squares)(torch.randn(5, 4))


def test_a_batch_changed_before_the_sums_is_noticed():
    x = torch.randn(5, 4)
    grads = Ghost(nn.Linear(4, 3), squares)(x)
    grads.norms()
    x.mul_(1000)
    with pytest.raises(ValueError, match="changed in place"):
        grads.weighted_sum(torch.ones(5))


def test_a_function_that_fails_under_vmap_alone_is_not_caught_by_the_model():
    def run(m, x):
        try:
            return m.a(x[x > 0][None, :1].expand(-1, 4))
        except RuntimeError:
            return m.a(x) * 0

    with pytest.raises(ValueError, match="boolean mask"):
        Ghost(Call(run, a=nn.Linear(4, 3)), squares)(torch.randn(5, 4))


def test_what_a_forward_pass_keeps_does_not_break_the_model():
    def run(m, x):
        out = torch.zeros(len(x), 4)
        out += x
        if getattr(m, "mask", None) is None:
            m.mask = torch.full((4,), 2.0)
        m.seen = m.a(out * m.mask)
        return m.seen

    model = Call(run, a=nn.Linear(4, 3))
    Ghost(model, squares)(torch.randn(5, 4))
    pickle.dumps(model.state_dict())
    copy.deepcopy(model)
    model(torch.randn(5, 4)).sum().backward()


def test_samples_left_in_a_buffer_are_refused_and_the_buffer_put_back():
    def run(m, x):
        m.mean = 0.9 * m.mean + x.mean(0).detach()
        return m.a(x - m.mean)

    model = Call(run, a=nn.Linear(4, 3))
    model.register_buffer("mean", torch.zeros(4))
    with pytest.raises(ValueError, match="'mean'"):
        Ghost(model, squares)(torch.randn(5, 4))
    assert torch.equal(model.mean, torch.zeros(4))


@pytest.mark.parametrize("scale", [1e10, 1e-12])
def test_grams_that_overflow_or_vanish_are_not_taken(scale, monkeypatch):
    monkeypatch.setattr("dpsgd.engines.ghost.part.KEPT_SHARE", 0.0)
    monkeypatch.setattr(rows, "GRAM_SHARE", 1e9)
    x = (torch.randn(4, 1, 64) * scale).expand(4, 3, 64).contiguous()
    model = nn.Linear(64, 64, bias=False)
    loss = lambda m, b: (m(b) * scale).flatten(1).sum(1)  # noqa: E731
    norms, exact = Ghost(model, loss)(x).norms(), Loop(model, loss)(x).norms()
    torch.testing.assert_close(norms, exact, rtol=1e-4, atol=0)


def test_a_large_table_is_not_expanded():
    model = Call(lambda m, x: m.w[x], w=P(50_000, 8))
    grads = Ghost(model, squares)(torch.randint(50_000, (16, 10)))
    assert grads.routes() == {"w": "indexed"}
    assert all(use.bytes_held < 1e5 for use in grads._parts[0].uses["w"])


def hooked_weight(m, x):
    w = m.w * 1
    w.register_hook(lambda g: g / g.norm())
    return F.linear(x, w)


def hooked_parameter(m, x):
    m.w.register_hook(lambda g: g * 0)
    return F.linear(x, m.w)


def hooked_then_changed(m, x):
    h = F.linear(x, m.w)
    h.register_hook(lambda g: g * 3)
    h.mul_(2)
    return h


@pytest.mark.parametrize("run", [hooked_weight, hooked_parameter, hooked_then_changed])
def test_hooks_that_would_not_see_the_right_gradients_are_refused(run):
    with pytest.raises(ValueError, match="hooks on"):
        Ghost(Call(run, w=P(3, 4)), squares)(torch.randn(5, 4))


class Clamped(torch.autograd.Function):
    """A backward that is not linear."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w):
        return w * 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-1, 1)


@pytest.mark.parametrize("kept", [0.0, 1.0, 1e9])
def test_a_weight_with_a_nonlinear_backward_is_pulled_back_sample_by_sample(kept, monkeypatch):
    monkeypatch.setattr("dpsgd.engines.ghost.part.KEPT_SHARE", kept)
    model = Call(lambda m, x: F.linear(x, Clamped.apply(m.w)), w=P(16, 16)).double()
    x = batch(4, 3, 16)
    weights = torch.tensor([1e-3, 0.5, 0.0, 2.0]).double()
    actual, expected = (e(model, squares)(x).weighted_sum(weights) for e in (Ghost, Loop))
    torch.testing.assert_close(actual, expected)


CANCELLING = {
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(Linear(64, 64, bias=False)),
    "computed": lambda: Call(lambda m, x: F.linear(x, m.w * 2), w=P(64, 64)),
    "two_spellings": lambda: Call(lambda m, x: F.linear(x, m.w) + x @ m.w, w=P(64, 64)),
    "overlapping": lambda: Call(
        lambda m, x: F.linear(x, m.w[:40]).sum(-1) + F.linear(x, m.w[24:]).sum(-1), w=P(64, 64)
    ),
    "index": lambda: Call(lambda m, x: m.w[(x[..., 0] > 0).long()] * x + x @ m.w.t(), w=P(64, 64)),
    "plain": lambda: Linear(64, 64),
    "conv": lambda: Call(lambda m, x: m.c(x.transpose(1, 2)), c=nn.Conv1d(64, 64, 1)),
}


@pytest.mark.parametrize("kept", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e3, 1e7])
@pytest.mark.parametrize("name", CANCELLING)
def test_terms_that_cancel_do_not_exceed_the_clip_norm(name, scale, kept, monkeypatch):
    """What they leave behind in float32 is another rounding error in every order of summation."""
    monkeypatch.setattr("dpsgd.engines.ghost.part.KEPT_SHARE", kept)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64) * scale
    x[:, 1], x[:, 2] = -x[:, 0], torch.randn(4, 64) * 1e-3
    grads = Ghost(CANCELLING[name](), lambda m, b: m(b).flatten(1).sum(1))(x)
    weights = clipping.Flat(0.01)(grads.norms())[:, 0]
    for i in range(4):
        sums = grads.weighted_sum(torch.eye(4)[i] * weights).values()
        assert sum(s.double().square().sum() for s in sums).sqrt() <= 0.01 * (1 + 1e-5)


def test_samples_kept_in_a_container_are_refused_and_removed():
    def run(m, x):
        if "first" not in m.cache:
            m.cache["first"] = x
        return m.a(x) * m.cache["first"]

    model = Call(run, a=Linear(4, 4), cache={})
    with pytest.raises(ValueError, match="'cache'"):
        Ghost(model, squares)(torch.randn(3, 4))
    assert model.cache == {}


def test_one_index_keeps_its_dimension():
    index = torch.tensor(1)
    model = Call(lambda m, x: x[0].index_select(0, index)[None] * m.w, w=P(4)).double()
    agree(model, squares, batch(3, 3, 4))


@pytest.mark.parametrize("size", [5, 1])
def test_a_weight_written_into_a_constant_is_written_once(size):
    def run(m, x):
        scale = torch.linspace(1, 2, 4, dtype=x.dtype)
        scale.add_(m.w)
        out = torch.zeros(len(x), 4, dtype=x.dtype)
        out += x * scale
        return torch.tanh(out)

    agree(Call(run, w=P(4)).double(), squares, batch(size, 4))


def test_samples_that_a_function_takes_out_of_vmap_are_refused():
    def run(m, x):
        inner = torch._C._functorch.get_unwrapped(m.a(x)).sum()
        return x * inner + m.b(x)

    with pytest.raises(ValueError, match=r"out of torch\.vmap"):
        Ghost(Call(run, a=Linear(4, 4), b=Linear(4, 4)), squares)(torch.randn(5, 4))
