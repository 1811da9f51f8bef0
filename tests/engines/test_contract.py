"""The contract of engines and of `PerSampleGrads`, for every engine."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, ENGINES, ZOO, labelled_loss, squares
from torch import nn

from dpsgd import engines
from dpsgd.rules.rows import squared_norms

ALL = {"loop": engines.Loop, **ENGINES}
every_engine = pytest.mark.parametrize("engine", ALL)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(size=5):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1)).double()


@every_engine
def test_methods_come_in_any_order_and_repeat(engine):
    grads = ALL[engine](net(), squares)(batch())
    weights = torch.rand(5)
    first = grads.weighted_sum(weights)
    dense = grads.materialize()
    norms = grads.norms()
    losses = grads.losses
    again = grads.weighted_sum(weights)
    for name in first:
        torch.testing.assert_close(first[name], again[name], rtol=0, atol=0)
        expected = torch.einsum("b,b...->...", weights.double(), dense[name])
        torch.testing.assert_close(first[name], expected)
    torch.testing.assert_close(grads.norms(), norms, rtol=0, atol=0)
    torch.testing.assert_close(grads.losses, losses, rtol=0, atol=0)


@every_engine
def test_gradients_end_with_the_engines_next_call(engine):
    run = ALL[engine](net(), squares)
    old = run(batch())
    run(batch())
    for use in (
        lambda: old.losses,
        old.norms,
        old.materialize,
        lambda: old.weighted_sum(torch.ones(5)),
    ):
        with pytest.raises(ValueError, match="next call"):
            use()


@every_engine
def test_results_alias_nothing(engine):
    grads = ALL[engine](net(), squares)(batch())
    losses, norms = grads.losses, grads.norms()
    dense, sums = grads.materialize(), grads.weighted_sum(torch.ones(5))
    kept = [losses.clone(), norms.clone(), *(t.clone() for t in (*dense.values(), *sums.values()))]
    for tensor in (losses, norms, *dense.values(), *sums.values()):
        tensor.fill_(7)
    fresh = [grads.losses, grads.norms(), *grads.materialize().values()]
    fresh += grads.weighted_sum(torch.ones(5)).values()
    for actual, expected in zip(fresh, kept, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@every_engine
def test_out_is_added_into(engine):
    grads = ALL[engine](net(), squares)(batch())
    sums = grads.weighted_sum(torch.ones(5))
    out = {name: torch.ones_like(total) for name, total in sums.items()}
    given = dict(out)
    result = grads.weighted_sum(torch.ones(5), out=out)
    for name in sums:
        assert result[name] is given[name]
        torch.testing.assert_close(out[name], sums[name] + 1)


@every_engine
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e308])
def test_weight_zero_silences_a_sample_that_is_not_finite(engine, poison):
    x = batch()
    x[2] = poison
    grads = ALL[engine](net(), squares)(x)
    weights = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.0])
    sums = grads.weighted_sum(weights)
    keep = [0, 1, 3, 4]
    expected = engines.Loop(net(), squares)(batch()[keep]).weighted_sum(weights[keep])
    for name in sums:
        torch.testing.assert_close(sums[name], expected[name])
    groups = [[n for n in sums if "weight" in n], [n for n in sums if "bias" in n]]
    by_group = grads.weighted_sum(weights[:, None].expand(-1, 2), groups)
    for name in sums:
        torch.testing.assert_close(by_group[name], expected[name])


@every_engine
def test_a_weight_on_a_sample_that_is_not_finite_raises(engine):
    x = batch()
    x[2] = float("nan")
    grads = ALL[engine](net(), squares)(x)
    assert not torch.isfinite(grads.norms()[2]).any()
    with pytest.raises(ValueError, match="not finite"):
        grads.weighted_sum(torch.ones(5))


@every_engine
def test_all_weights_zero_give_exact_zeros_even_if_everything_is_nan(engine):
    grads = ALL[engine](net(), squares)(torch.full((5, 4), float("nan")).double())
    for total in grads.weighted_sum(torch.zeros(5)).values():
        assert torch.equal(total, torch.zeros_like(total))


@every_engine
def test_empty_batch_gives_empty_norms_and_zero_sums(engine):
    model = net()
    grads = ALL[engine](model, squares)(batch(0))
    assert grads.losses.shape == (0,)
    assert grads.norms().shape == (0, 1)
    assert grads.norms([["0.weight"], ["0.bias", "2.weight", "2.bias"]]).shape == (0, 2)
    for name, p in model.named_parameters():
        assert torch.equal(grads.weighted_sum(torch.empty(0))[name], torch.zeros_like(p))
        assert grads.materialize()[name].shape == (0, *p.shape)


@every_engine
def test_single_sample(engine):
    expected = engines.Loop(net(), squares)(batch(1)).materialize()
    actual = ALL[engine](net(), squares)(batch(1)).materialize()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@every_engine
def test_the_model_is_left_as_found(engine):
    model = net()
    model[0].bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = {id(o): dict(vars(o)) for o in (*model.modules(), *model.parameters())}
    values = copy.deepcopy(model.state_dict())
    run = ALL[engine](model, squares)
    run(batch()).weighted_sum(torch.ones(5))
    for owner in (*model.modules(), *model.parameters()):
        assert vars(owner).keys() == before[id(owner)].keys()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
        assert not module._forward_pre_hooks
    for name, p in model.named_parameters():
        assert p.requires_grad == (name != "0.bias")
        if p.requires_grad:
            assert torch.equal(p.grad, torch.ones_like(p))
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    pickle.loads(pickle.dumps(copy.deepcopy(model)))


@every_engine
def test_the_model_is_left_as_found_after_an_error(engine):
    model = net()
    run = ALL[engine](model, lambda m, b: m(b).sum())
    before = {id(o): set(vars(o)) for o in (*model.modules(), *model.parameters())}
    with pytest.raises(ValueError, match="one loss per sample"):
        run(batch())
    for owner in (*model.modules(), *model.parameters()):
        assert set(vars(owner)) == before[id(owner)]
    assert not any(module._forward_hooks for module in model.modules())


@every_engine
def test_engines_survive_deepcopy(engine):
    run = ALL[engine](net(), squares)
    run(batch())
    norms = copy.deepcopy(run)(batch()).norms()
    torch.testing.assert_close(norms, run(batch()).norms())


@every_engine
def test_gradients_are_freed_with_their_last_reference(engine):
    run = ALL[engine](net(), squares)
    grads = run(batch())
    watched = weakref.ref(grads)
    del grads
    gc.collect()
    assert watched() is None


@every_engine
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda m, b: m(b).square().mean(), "one loss per sample"),
        (lambda m, b: m(b).square(), "one loss per sample"),
        (lambda m, b: None, "tensor of losses"),
        (lambda m, b: m(b).argmax(1), "floating losses"),
    ],
)
def test_a_loss_of_the_wrong_shape_is_refused(engine, loss, words):
    with pytest.raises(ValueError, match=words):
        ALL[engine](net(), loss)(batch())


@every_engine
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ((torch.zeros(4, 4), torch.zeros(5)), r"one batch size.*batch\[0\]: 4.*batch\[1\]: 5"),
        ({"x": torch.zeros(4, 4), "n": 3}, r"got int at batch\['n'\]"),
        ((torch.zeros(4, 4), torch.tensor(1.0)), "scalar"),
        ((), "empty structure"),
    ],
)
def test_a_batch_that_disagrees_in_size_is_refused(engine, bad, words):
    with pytest.raises(ValueError, match=words):
        ALL[engine](net(), squares)(bad)


@every_engine
def test_nothing_trainable_is_refused(engine):
    with pytest.raises(ValueError, match="trainable"):
        ALL[engine](net().requires_grad_(False), squares)(batch())


@every_engine
def test_weights_and_groups_that_do_not_fit_are_refused(engine):
    grads = ALL[engine](net(), squares)(batch())
    for weights in (torch.ones(4), torch.ones(5, 2), torch.full((5,), float("nan"))):
        with pytest.raises(ValueError, match="weights"):
            grads.weighted_sum(weights)
    for groups in ([["0.weight"]], [["0.weight"], ["no"]], [list(grads.materialize())] * 2, ["a"]):
        with pytest.raises(ValueError, match="groups"):
            grads.norms(groups)


@every_engine
def test_works_under_no_grad(engine):
    with torch.no_grad():
        norms = ALL[engine](net(), squares)(batch()).norms()
    torch.testing.assert_close(norms, engines.Loop(net(), squares)(batch()).norms())


@every_engine
@pytest.mark.parametrize("training", [True, False])
def test_dropout_in_train_and_eval(engine, training):
    """In eval the engines agree; in train each sample draws a mask of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 1, bias=False)).double().train(training)
    x = torch.ones(6, 16).double()
    grads = ALL[engine](model, lambda m, b: m(b)[:, 0])(x).materialize()["1.weight"][:, 0]
    if training:
        assert set(grads.unique().tolist()) == {0.0, 2.0}
        assert len(grads.unique(dim=0)) > 1
    else:
        torch.testing.assert_close(grads, x)


@every_engine
def test_cross_entropy_of_labels_keeps_integer_targets(engine):
    model = nn.Linear(4, 3).double()
    data = (batch(), torch.tensor([0, 1, 2, 0, 1]))
    torch.testing.assert_close(
        ALL[engine](model, labelled_loss)(data).losses,
        F.cross_entropy(model(data[0]), data[1], reduction="none").detach(),
    )


@pytest.mark.parametrize("engine", [name for name in ALL if name != "opacus-ghost"])
def test_bfloat16_norms_and_sums_are_float32(engine):
    grads = ALL[engine](net().bfloat16(), squares)(batch().bfloat16())
    assert grads.norms().dtype == torch.float32
    assert all(s.dtype == torch.float32 for s in grads.weighted_sum(torch.ones(5)).values())
    expected = engines.Loop(net(), squares)(batch()).norms().float()
    torch.testing.assert_close(grads.norms(), expected, rtol=0.05, atol=0.05)


def test_a_huge_gradient_keeps_its_norm_in_float32():
    x = batch().float()
    x[0] *= 1e25
    model = nn.Linear(4, 3)
    for name, engine in ALL.items():
        norms = engine(model, lambda m, b: m(b).sum(1))(x).norms()
        assert norms[0] > 1e24
        # Opacus's own ghost norm overflows: infinite, so its sample gets weight 0
        assert torch.isfinite(norms).all() or name == "opacus-ghost"


def test_hooks_catch_an_input_changed_in_place_after_its_use():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            x = x * 2
            y = self.layer(x)
            x.add_(1)
            return y

    with pytest.raises(ValueError, match="modified in place"):
        engines.Hooks(Changing().double(), squares)(batch())


def test_hooks_list_every_parameter_without_a_rule():
    model = nn.Sequential(nn.LSTM(4, 3), nn.Linear(3, 2), nn.MultiheadAttention(4, 2))
    with pytest.raises(ValueError, match=r"0\.weight_ih_l0.*2\.in_proj_weight.*engine=vmap"):
        engines.Hooks(model, squares)(torch.randn(2, 4))


def test_hooks_equal_the_full_backward_hook_form():
    """The older form, hook(module, grad_input, grad_output), sees the same output gradients."""
    model, x = net(), batch()
    seen = {"0": [], "2": []}
    for name, record in seen.items():
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda m, a, y, record=record: record.append(a[0]))
        layer.register_full_backward_hook(lambda m, gi, go, record=record: record.append(go[0]))
    squares(model, x).sum().backward()
    grads = engines.Hooks(net(), squares)(x).materialize()
    for name, (a, g) in seen.items():
        torch.testing.assert_close(
            grads[f"{name}.weight"], torch.einsum("bp,bd->bpd", g, a.detach())
        )
        torch.testing.assert_close(grads[f"{name}.bias"], g)


def test_a_subclass_that_overrides_the_computation_has_no_rule():
    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean(), bias)

    with pytest.raises(ValueError, match="No rule"):
        engines.Hooks(Standardised(1, 2, 2), squares)(torch.randn(2, 1, 3, 3))


def test_opacus_ghost_refuses_bfloat16_whose_norms_it_rounds():
    with pytest.raises(ValueError, match="exceed the clip norm"):
        engines.Opacus(net().bfloat16(), squares, mode="ghost")(batch().bfloat16())


def test_opacus_options_are_checked():
    with pytest.raises(ValueError, match="hooks, functorch, ew, ghost"):
        engines.Opacus(net(), squares, mode="fast")


def test_vmap_options_are_checked():
    with pytest.raises(ValueError, match="chunk_size"):
        engines.Vmap(net(), squares, chunk_size=0)


def test_vmap_compiled_agrees():
    expected = engines.Loop(net(), squares)(batch()).materialize()
    actual = engines.Vmap(net(), squares, compile=True)(batch()).materialize()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_case_names_are_unique():
    assert len({case.name for case in CASES + ZOO}) == len(CASES + ZOO)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("width", [1, 4096, 10_000])
def test_norms_are_right_at_every_scale_and_width(dtype, scale, width):
    rows = (torch.randn(3, width) * scale).to(dtype)
    rows[1] = 0
    expected = rows.double().square().sum(1)
    torch.testing.assert_close(squared_norms(rows).double(), expected, rtol=1e-5, atol=0)


def test_a_long_float32_sum_loses_no_small_terms():
    rows = torch.full((1, 1 << 25), 1e-3)
    rows[0, 0] = 100.0
    expected = 1e4 + (1 << 25) * 1e-6
    assert abs(squared_norms(rows).item() / expected - 1) < 1e-6


@every_engine
def test_sums_overwrite_what_out_holds_or_add_to_it(engine):
    run = ALL[engine](net(), squares)
    grads, weights = run(batch()), torch.rand(5)
    expected = grads.weighted_sum(weights)
    out = {name: torch.full_like(total, float("nan")) for name, total in expected.items()}
    assert grads.weighted_sum(weights, out=out, beta=0) == out
    for name, total in expected.items():
        torch.testing.assert_close(out[name], total)
    grads.weighted_sum(weights, out=out)
    for name, total in expected.items():
        torch.testing.assert_close(out[name], 2 * total)
    with pytest.raises(ValueError, match=r"beta to be 0 or 1, got 0\.5"):
        grads.weighted_sum(weights, out=out, beta=0.5)


@every_engine
def test_sums_of_all_parameters_lie_in_one_block_of_memory(engine):
    sums = ALL[engine](net(), squares)(batch()).weighted_sum(torch.ones(5))
    assert len({total.untyped_storage().data_ptr() for total in sums.values()}) == 1
    ends = [total.storage_offset() + total.numel() for total in sums.values()]
    assert [total.storage_offset() for total in sums.values()] == [0, *ends[:-1]]


@every_engine
def test_sums_fit_into_strided_and_wider_tensors(engine):
    grads = ALL[engine](net(), squares)(batch())
    expected = grads.weighted_sum(torch.ones(5))
    out = {n: torch.zeros(t.shape[::-1], dtype=torch.float64).T for n, t in expected.items()}
    grads.weighted_sum(torch.ones(5), out=out)
    for name, total in expected.items():
        torch.testing.assert_close(out[name], total)
