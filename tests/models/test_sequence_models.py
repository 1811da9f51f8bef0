"""The sequence models read token ids, sequences of vectors, and images row by row."""

from __future__ import annotations

import pytest
import torch

from dpsgd import engines, losses
from dpsgd.models import LSTM, Transformer
from dpsgd.models.sequence import as_sequence

both = pytest.mark.parametrize("build", [LSTM, Transformer])


@both
def test_token_ids(build):
    model = build([12], 3, vocab_size=20)
    assert model(torch.randint(20, (5, 12))).shape == (5, 3)


@both
def test_sequences_of_vectors(build):
    assert build([12, 7], 3)(torch.randn(5, 12, 7)).shape == (5, 3)


@both
def test_images(build):
    assert build([3, 8, 6], 3)(torch.randn(5, 3, 8, 6)).shape == (5, 3)


@both
def test_one_dimension_needs_a_vocabulary(build):
    with pytest.raises(ValueError, match="Set vocab_size"):
        build([12], 3)


@both
def test_token_ids_have_one_dimension(build):
    with pytest.raises(ValueError, match="Set vocab_size to null"):
        build([12, 7], 3, vocab_size=20)


@both
def test_the_order_of_tokens_matters(build):
    torch.manual_seed(0)
    model, ids = build([6], 3, vocab_size=20), torch.arange(6)[None]
    assert not torch.allclose(model(ids), model(ids.flip(1)), rtol=1e-4)


def test_rows_of_an_image_hold_all_channels():
    x = torch.randn(2, 3, 8, 6)
    torch.testing.assert_close(as_sequence(x)[1, 5], x[1, :, 5].flatten())


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="heads to divide width, got 3 and 64"):
        Transformer([12, 7], 3, heads=3)


def test_every_layer_of_the_transformer_sees_the_samples_first():
    model = Transformer([6], 3, vocab_size=20, width=8, heads=2).double()
    seen = []
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    model(torch.randint(20, (5, 6)))
    assert seen
    assert all(a.shape[0] == out.shape[0] == 5 for a, out in seen)


def test_hooks_run_the_transformer():
    torch.manual_seed(0)
    model = Transformer([6], 3, vocab_size=20, width=8, heads=2).double()
    batch = torch.randint(20, (4, 6)), torch.randint(3, (4,))
    got = engines.Hooks(model, losses.cross_entropy)(batch).norms()
    expected = engines.Loop(model, losses.cross_entropy)(batch).norms()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
