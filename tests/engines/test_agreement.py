"""Every engine against `Loop` on every case: 1e-10 relative in float64, 1e-4 in float32."""

import pytest
import torch
from cases import CASES, ENGINES, refusal

from dpsgd.engines import Loop

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def assert_close(actual, expected, dtype):
    scale = max(expected.abs().max().item(), 1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale, check_dtype=False
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_agrees_with_loop_or_refuses_by_name(engine, case, dtype):
    model, loss, batch = case.build(dtype)
    words = refusal(case.name, engine, dtype)
    if words is not None:
        with pytest.raises(ValueError, match=words):
            ENGINES[engine](model, loss)(batch)
        return
    reference = Loop(model, loss)(batch)
    grads = ENGINES[engine](model, loss)(batch)
    weights = torch.linspace(0, 1.5, 5, dtype=dtype)
    groups = [[name] for name in reference.materialize()]
    assert_close(grads.losses, reference.losses, dtype)
    assert_close(grads.norms(), reference.norms(), dtype)
    assert_close(grads.norms(groups), reference.norms(groups), dtype)
    by_group = weights[:, None] * torch.linspace(0.5, 2, len(groups), dtype=dtype)
    for method, args in (
        ("materialize", ()),
        ("weighted_sum", (weights,)),
        ("weighted_sum", (by_group, groups)),
    ):
        actual, expected = getattr(grads, method)(*args), getattr(reference, method)(*args)
        assert list(actual) == list(expected)
        for name in expected:
            assert_close(actual[name], expected[name], dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_unit_weights_give_autograds_own_gradient(case):
    model, loss, batch = case.build(torch.float64)
    sums = Loop(model, loss)(batch).weighted_sum(torch.ones(5))
    loss(model, batch).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            assert_close(sums[name], expected, torch.float64)
