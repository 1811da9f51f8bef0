"""Clipping policies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpsgd.clipping import Flat, UnitNorm


@given(
    bound=st.floats(1e-6, 1e6),
    norms=st.lists(st.floats(0, 1e30), min_size=1, max_size=20),
)
def test_no_clipped_norm_exceeds_the_bound(bound, norms):
    for dtype in (torch.float32, torch.float64):
        column = torch.tensor(norms, dtype=dtype)[:, None]
        weights = Flat(bound)(column)
        assert (weights * column <= bound * (1 + 1e-6)).all()
        assert ((weights == 1) | (column > bound * (1 - 1e-6))).all()


def test_norms_that_are_not_finite_weigh_nothing():
    norms = torch.tensor([[float("nan")], [float("inf")], [0.0], [4.0]])
    assert Flat(2.0)(norms).flatten().tolist() == [0, 0, 1, 0.5]


def test_one_group_and_its_sensitivity():
    assert Flat(2.0).groups(["a", "b"]) == [["a", "b"]]
    assert Flat(2.0).sensitivity == 2.0


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_bound_is_refused(bound):
    with pytest.raises(ValueError, match="max_grad_norm"):
        Flat(bound)


@given(norms=st.lists(st.floats(0, 1e6), min_size=1, max_size=20), bound=st.floats(1e-3, 1e3))
def test_unit_norm_is_flat_divided_by_c(norms, bound):
    column = torch.tensor(norms, dtype=torch.float64)[:, None]
    torch.testing.assert_close(UnitNorm(bound)(column), Flat(bound)(column) / bound)
    assert UnitNorm(bound).sensitivity == 1
    assert (UnitNorm(bound)(column) * column <= 1 + 1e-12).all()


def test_a_clip_norm_that_clips_everything_does_not_change_a_unit_norm_update():
    norms = torch.tensor([[3.0], [4.0]])
    assert torch.equal(UnitNorm(1.0)(norms), UnitNorm(0.01)(norms))
