"""What only the ghost engine does: capture, numerics, memory, and what it refuses."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
import zoo
from cases import CASES, squares
from memory import saved_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpsgd import clipping
from dpsgd.engines import Ghost, Loop
from dpsgd.rules import rows

EPS = 1 + 1e-5


def batch(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def agree(model, loss, x, rtol=1e-10):
    expected, actual = Loop(model, loss)(x), Ghost(model, loss)(x)
    torch.testing.assert_close(actual.norms(), expected.norms(), rtol=rtol, atol=rtol)
    torch.testing.assert_close(actual.materialize(), expected.materialize(), rtol=rtol, atol=rtol)
    return actual


# --- numerics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gram", [1.0, 1e9], ids=["chosen", "gram"])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e8])
def test_cancelling_tokens_do_not_hide_a_gradient(gram, scale, monkeypatch):
    """T = 4096 in float32: pairs that cancel around a gradient of norm 50 that remains."""
    monkeypatch.setattr(rows, "GRAM_SHARE", gram)
    monkeypatch.setattr("dpsgd.engines.ghost.part.KEPT_SHARE", 0.0)
    v, u = batch(3, 2048, 16, dtype=torch.float32) * scale, torch.zeros(3, 2048, 16)
    u[:, 0, 0] = 25.0
    x = torch.stack([v + u, u - v], 2).flatten(1, 2)
    model = nn.Linear(16, 8, bias=False)
    loss = lambda m, b: m(b).sum((1, 2))  # noqa: E731
    norms = Ghost(model, loss, strategy="formulas")(x).norms()[:, 0].double()
    exact = Loop(model.double(), loss)(x.double()).norms()[:, 0]
    assert (norms >= exact * (1 - 1e-6)).all()
    if scale == 1.0:
        torch.testing.assert_close(norms, exact, rtol=0.05, atol=0)


@pytest.mark.parametrize("kept", [0.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weighted_row_is_longer_than_the_clip_norm(dtype, kept, monkeypatch):
    """Whatever the rounding: w_i g_i, as it is summed, has norm C at most."""
    monkeypatch.setattr("dpsgd.engines.ghost.part.KEPT_SHARE", kept)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    model[3].weight = model[0].weight
    model = model.to(dtype)
    loss = lambda m, b: (m(b).float() * torch.linspace(-1e3, 1e3, 5)).sum((1, 2))  # noqa: E731
    ids = torch.randint(5, (4, 64))
    ids[1], ids[2, ::2] = 3, 1
    grads = Ghost(model, loss)(ids)
    weights = clipping.Flat(1.0)(grads.norms())[:, 0]
    for i in range(4):
        sums = grads.weighted_sum(torch.eye(4)[i] * weights)
        assert sum(s.double().square().sum() for s in sums.values()).sqrt() <= EPS


def test_norms_of_a_huge_and_a_tiny_sequence_are_finite_and_right():
    x = batch(3, 6, 4, dtype=torch.float32)
    x[0] *= 1e25
    x[1] *= 1e-25
    loss = lambda m, b: m(b).sum((1, 2))  # noqa: E731
    model = nn.Linear(4, 300, bias=False)
    norms = Ghost(model, loss)(x).norms()[:, 0].double()
    torch.testing.assert_close(
        norms, Loop(model.double(), loss)(x.double()).norms()[:, 0], rtol=1e-4, atol=0
    )


def test_autocast_keeps_norms_and_sums_in_float32():
    model = nn.Sequential(zoo.encoder(), nn.Linear(4, 3))

    def loss(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m(x).float().square().mean((1, 2))

    x = batch(4, 5, 4, dtype=torch.float32)
    grads, expected = Ghost(model, loss)(x), Loop(model, loss)(x)
    assert grads.norms().dtype == torch.float32
    assert all(s.dtype == torch.float32 for s in grads.weighted_sum(torch.ones(4)).values())
    torch.testing.assert_close(grads.norms(), expected.norms(), rtol=0.03, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(grads.norms(), Ghost(model, loss)(x).norms())


def test_a_weight_cast_to_bfloat16_is_summed_in_float32():
    """A sum of gradients that was rounded to bfloat16 could move by more than C."""
    model = zoo.Call(lambda m, x: F.linear(x, m.w.bfloat16()).float(), w=zoo.parameter(3, 4))
    x = batch(64, 4).bfloat16()
    loss = lambda m, b: m(b).square().sum(1)  # noqa: E731
    actual, expected = Ghost(model, loss)(x), Loop(model, loss)(x)
    torch.testing.assert_close(
        actual.weighted_sum(torch.ones(64))["w"],
        expected.weighted_sum(torch.ones(64))["w"],
        rtol=1e-5,
        atol=1e-5,
    )


# --- recurrent networks and control flow ------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_compute_what_pytorch_computes(kind):
    model = zoo.recurrent(kind, num_layers=2, bidirectional=True, batch_first=True).float()
    x = batch(5, 7, 4, dtype=torch.float32)
    expected = squares(model, x)
    torch.testing.assert_close(Ghost(model, squares)(x).losses, expected, rtol=1e-6, atol=1e-6)


def test_dropout_between_recurrent_layers_differs_from_sample_to_sample():
    model = zoo.recurrent(nn.LSTM, num_layers=2, dropout=0.5, batch_first=True)
    losses = Ghost(model, squares)(torch.ones(6, 5, 4)).losses
    assert len(losses.unique()) == 6


def test_samples_that_disagree_are_split_and_come_back_in_order():
    model = zoo.branches().double()
    x = batch(7, 4)
    grads = agree(model, squares, x)
    torch.testing.assert_close(grads.losses, Loop(model, squares)(x).losses)
    assert len(grads._parts) > 1


def test_samples_that_agree_are_not_split():
    x = batch(4, 4).abs()
    assert (
        len(
            Ghost(
                zoo.Call(lambda m, x: m.l(x) if (x >= 0).all() else x, l=nn.Linear(4, 4)).double(),
                squares,
            )(x)._parts
        )
        == 1
    )


def test_a_value_read_into_python_is_that_of_each_sample():
    def run(m, x):
        return m.layer(x) * float(x.max()) + len(str(x.sum().item() > 0))

    agree(zoo.Call(run, layer=nn.Linear(4, 3)).double(), squares, batch(5, 4))


# --- memory and what is left behind -----------------------------------------------------------


def live_tensors():
    gc.collect()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("name", ["mlp", "conv2d", "tied", "lstm", "attention", "weight_norm"])
def test_nothing_stays_after_the_gradients_are_gone(name):
    case = next(case for case in CASES if case.name == name)
    model, loss, x = case.build(torch.float64)
    engine = Ghost(model, loss)
    engine(x).norms()
    before = live_tensors()
    for _ in range(3):
        grads = engine(x)
        grads.weighted_sum(clipping.Flat(1.0)(grads.norms()))
        del grads
    assert live_tensors() <= before


def test_gradients_are_freed_without_the_garbage_collector():
    engine = Ghost(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), squares)
    gc.collect()
    gc.disable()
    try:
        grads = engine(torch.randn(3, 4))
        held = weakref.ref(grads._parts[0].uses["0.weight"][0].call.g)
        del grads
        assert held() is None
    finally:
        gc.enable()


def test_checkpoints_keep_their_saving():
    def stack(saving):
        def run(m, x):
            for block in m.blocks:
                x = checkpoint(block, x, use_reentrant=False) if saving else block(x)
            return x

        blocks = [nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.GELU())] * 8
        return zoo.Call(run, blocks=nn.ModuleList(copy.deepcopy(b) for b in blocks))

    x = torch.randn(64, 64)
    assert saved_bytes(stack(True), squares, x) < 0.4 * saved_bytes(stack(False), squares, x)


def test_a_checkpoint_is_recomputed_once_per_call():
    calls = []

    def run(m, x):
        return checkpoint(lambda y: (calls.append(1), m.layer(y))[1], x, use_reentrant=False)

    Ghost(zoo.Call(run, layer=nn.Linear(4, 3)), squares)(torch.randn(5, 4))
    assert len(calls) == 2


def test_two_models_share_a_module_in_two_threads():
    shared = nn.Linear(4, 4).double()
    models = [nn.Sequential(shared, nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(2)]
    x = batch(6, 4)
    expected = [Loop(model, squares)(x).norms() for model in models]
    wrong = []

    def work(i):
        engine = Ghost(models[i], squares)
        for _ in range(20):
            if not torch.allclose(engine(x).norms(), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_engine_pickles_and_copies():
    engine = Ghost(zoo.encoder().double(), squares)
    x = batch(3, 4, 4)
    expected = engine(x).norms()
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        torch.testing.assert_close(other(x).norms(), expected)


# --- what is refused --------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w * 2

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w * 2, (g * x * 2).sum(0)


class Supported(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


def gradient_penalty(m, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(m.layer(x).square().sum(), x, create_graph=True)[0]


REFUSED = {
    "mask": (lambda m, x: m.layer(x[x > 0][None, :0]), "__getitem__.*boolean mask.*engine=loop"),
    "nonzero": (lambda m, x: m.layer(x)[:, x[0].nonzero()[:, 0]], "nonzero"),
    "batch_norm": (lambda m, x: F.batch_norm(m.layer(x), None, None, training=True), "GroupNorm"),
    "function": (lambda m, x: Doubled.apply(x, m.w), "setup_context.*engine=loop"),
    "penalty": (gradient_penalty, "differentiate"),
    "buffer": (lambda m, x: m.layer(x) + m.state.copy_(x[0]), "copy_"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused_by_name(name):
    run, words = REFUSED[name]
    model = nn.Sequential(zoo.Call(run, layer=nn.Linear(4, 4), w=zoo.parameter(4)))
    model[0].register_buffer("state", torch.zeros(4))
    with pytest.raises(ValueError, match=words):
        Ghost(model, squares)(torch.randn(5, 4))
    assert not any(p.grad is not None for p in model.parameters())


def test_a_scripted_part_is_refused_with_the_parameters_name():
    model = zoo.Call(lambda m, x: m.layer(x), layer=torch.jit.script(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"TorchScript.*'layer'"):
        Ghost(model, squares)(torch.randn(5, 4))


def test_a_parameter_in_disguise_is_refused():
    """As under sharding: the forward pass uses another tensor than the module owns."""

    copied = torch.randn(3, 4, requires_grad=True)
    model = zoo.Call(lambda m, x: F.linear(x, copied, m.layer.bias), layer=nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"\[3, 4\].*'layer\.weight'.*unused"):
        Ghost(model, squares)(torch.randn(5, 4))


def test_a_custom_function_that_supports_vmap_is_exact():
    model = zoo.Call(lambda m, x: Supported.apply(x, m.w), w=zoo.parameter(4)).double()
    agree(model, squares, batch(5, 4))


def test_an_unfrozen_teacher_in_a_closure_changes_nothing():
    teacher = nn.Linear(4, 3).double()
    loss = lambda m, x: (m(x) - teacher(x)).square().sum(1)  # noqa: E731
    agree(nn.Linear(4, 3).double(), loss, batch(5, 4))


def test_the_module_where_it_happens_is_named():
    inner = zoo.Call(lambda m, x: m.layer(x[x > 0]), layer=nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"gate": inner})["gate"])
    with pytest.raises(ValueError, match=r"in '1' \(Call\)"):
        Ghost(model, squares)(torch.randn(5, 4))


def test_a_hook_keeps_no_activation_in_memory():
    """The graph holds hooks; a hook that held an activation would keep both until gc comes."""
    kept = []

    def loss(model, x):
        hidden = model[0](x)
        hidden.register_hook(lambda g: g * 2)
        kept.append(weakref.ref(hidden))
        return model[1](hidden.tanh()).square().sum(1)

    engine = Ghost(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), loss)
    gc.disable()
    try:
        engine(torch.randn(5, 3)).norms()
        assert kept
        assert not any(hidden() is not None for hidden in kept)
    finally:
        gc.enable()
