"""Printed digits."""

import pytest
import torch

from dpsgd.data import digits, glyphs


def test_they_have_the_format_of_digits_and_are_the_same_each_time():
    made, again, real = (
        glyphs(num_train=40, num_test=10),
        glyphs(num_train=40, num_test=10),
        digits(),
    )
    assert made.train[0].shape == (40, 1, 8, 8)
    assert made.input_shape == real.input_shape
    assert all(torch.equal(a, b) for a, b in zip(made.train, again.train))
    assert not torch.equal(made.train[0], glyphs(num_train=40, num_test=10, seed=1).train[0])
    assert made.train[0].min() == 0
    assert 0.9 < made.train[0].max() <= 1


def test_every_digit_reaches_from_top_to_bottom():
    x = glyphs(num_train=60, num_test=1).train[0]
    assert (x[:, 0, [0, -1]].amax(-1) > 0).all()


def test_they_are_public_constants_away_from_the_cells():
    plain, shifted = (
        glyphs(num_train=5, num_test=1),
        glyphs(num_train=5, num_test=1, mean=0.5, std=0.25),
    )
    torch.testing.assert_close(shifted.train[0], (plain.train[0] - 0.5) / 0.25)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"std": 0}, "std"), ({"num_test": 0}, "num_test"), ({"num_classes": 9}, "labels")],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        glyphs(**{"num_train": 20, "num_test": 5, **options})
