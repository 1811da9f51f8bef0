"""Every engine against `Loop` on every case: 1e-10 relative in float64, 1e-4 in float32."""

import pytest
import torch
from cases import CASES, ENGINES, ZOO, refusal

from dpsgd.engines import Ghost, Loop

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def assert_close(actual, expected, dtype, least=1e-3):
    scale = max(expected.abs().max().item(), least) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale, check_dtype=False
    )


def check(engine, case, dtype):
    model, loss, batch = case.build(dtype)
    dtype = case.inside or dtype
    reference = Loop(model, loss)(batch)
    grads = engine(model, loss)(batch)
    weights = torch.linspace(0, 1.5, 5, dtype=torch.float64)
    groups = [[name] for name in reference.materialize()]
    assert_close(grads.losses, reference.losses, dtype)
    assert_close(grads.norms(), reference.norms(), dtype)
    assert_close(grads.norms(groups), reference.norms(groups), dtype)
    direction = reference.weighted_sum(weights)
    assert_close(grads.dot(direction), reference.dot(direction), dtype)
    assert_close(grads.gram(), reference.gram(), dtype)
    by_group = weights[:, None] * torch.linspace(0.5, 2, len(groups), dtype=torch.float64)
    for method, args in (
        ("materialize", ()),
        ("weighted_sum", (weights,)),
        ("weighted_sum", (by_group, groups)),
    ):
        actual, expected = getattr(grads, method)(*args), getattr(reference, method)(*args)
        scale = max(value.abs().max().item() for value in expected.values() if value.numel())
        assert list(actual) == list(expected)
        for name in expected:
            assert_close(actual[name], expected[name], dtype, scale / 100)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_agrees_with_loop_or_refuses_by_name(engine, case, dtype):
    words = refusal(case.name, engine, dtype)
    if words is None:
        check(ENGINES[engine], case, dtype)
        return
    model, loss, batch = case.build(dtype)
    with pytest.raises(ValueError, match=words):
        ENGINES[engine](model, loss)(batch)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_ghost_agrees_with_loop_on_every_model(case, dtype):
    check(Ghost, case, dtype)


ROUTES = {
    "kept": (1e9, 1.0, 32 << 20),  # gradients formed once and kept
    "gram": (0.0, 1e9, 32 << 20),  # never formed where a rule can do without
    "formed": (0.0, -1.0, 1),  # formed for each norm and sum, one sample at a time
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", CASES + ZOO, ids=lambda case: case.name)
def test_every_route_of_the_ghost_engine_agrees(case, route, monkeypatch):
    if refusal(case.name, "ghost", torch.float64):
        with pytest.raises(ValueError, match=refusal(case.name, "ghost", torch.float64)):
            check(Ghost, case, torch.float64)
        return
    kept, gram, piece = ROUTES[route]
    monkeypatch.setattr("dpsgd.engines.ghost.part.KEPT_SHARE", kept)
    monkeypatch.setattr("dpsgd.rules.rows.GRAM_SHARE", gram)
    monkeypatch.setattr("dpsgd.rules.rows.CHUNK_BYTES", piece)
    check(Ghost, case, torch.float64)


# its ordinary batched forward decides for all samples together: the function is another one
BATCHED = [case for case in ZOO if case.name != "branches"]


@pytest.mark.parametrize("case", BATCHED, ids=lambda case: case.name)
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ghost"])
def test_every_other_engine_is_exact_or_names_the_way_out(engine, case):
    model, loss, batch = case.build(torch.float64)
    try:
        ENGINES[engine](model, loss)(batch)
    except ValueError as error:
        refused = str(error)
    else:
        check(ENGINES[engine], case, torch.float64)
        return
    assert "ngine" in refused or "Expected" in refused


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_unit_weights_give_autograds_own_gradient(case):
    model, loss, batch = case.build(torch.float64)
    sums = Loop(model, loss)(batch).weighted_sum(torch.ones(5))
    loss(model, batch).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            assert_close(sums[name], expected, torch.float64)
