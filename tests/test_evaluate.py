"""Test results: what the loss is judged by."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from dpsgd import losses, metrics
from dpsgd.data import Dataset
from dpsgd.evaluate import evaluate
from dpsgd.losses import IGNORED

WORDS = 5


class Bigrams(nn.Module):
    """Scores of the next token given the last one."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(WORDS, WORDS)

    def forward(self, ids):
        return self.table(ids)


def sequences(count=7, length=4):
    x = torch.randint(WORDS, (count, length))
    y = x.clone()
    y[::2, 2:] = IGNORED
    return Dataset((x, y), (x, y), [length], WORDS, count, WORDS)


def test_perplexity_is_by_token_and_the_loss_by_sequence():
    model, data = Bigrams(), sequences()
    x, y = data.test
    nats = -model(x)[:, :-1].log_softmax(-1).gather(2, x[:, 1:, None])[..., 0]
    counted = y[:, 1:] != IGNORED
    found = evaluate(model, losses.causal_lm, data)
    assert found["test_perplexity"] == pytest.approx(float(nats[counted].mean().exp()), rel=1e-6)
    by_sequence = (nats * counted).sum(1) / counted.sum(1)
    assert found["test_loss"] == pytest.approx(float(by_sequence.mean()), rel=1e-6)
    assert "test_accuracy" not in found


def test_the_loss_of_a_configuration_is_a_partial():
    found = evaluate(Bigrams(), functools.partial(losses.causal_lm), sequences())
    assert set(found) == {"test_loss", "test_perplexity"}


def test_batches_do_not_matter(monkeypatch):
    model, data = Bigrams(), sequences()
    whole = evaluate(model, losses.causal_lm, data)
    monkeypatch.setattr("dpsgd.evaluate._SCORES", 50)
    assert evaluate(model, losses.causal_lm, data) == pytest.approx(whole)


def test_a_hopeless_model_has_infinite_perplexity():
    model = Bigrams()
    with torch.no_grad():
        model.table.weight.mul_(1e6)
    assert evaluate(model, losses.causal_lm, sequences())["test_perplexity"] == math.inf


def test_accuracy_by_position_counts_what_counts():
    """Labels per position, of which some do not count: a share, never more than one."""

    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, ids):
            return self.scale * nn.functional.one_hot(ids, WORDS).transpose(1, 2).float()

    assert evaluate(Copies(), losses.cross_entropy, sequences())["test_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("test", "name", "words"),
    [
        ({"test_loss": 2.5, "test_accuracy": 0.5}, "test_accuracy", "50.0%"),
        ({"test_loss": 2.5, "test_perplexity": 12.182}, "test_perplexity", "12.18"),
        ({"test_loss": 2.5}, "test_loss", "2.5000"),
    ],
)
def test_the_most_telling_result(test, name, words):
    assert metrics.headline(test) == name
    assert metrics.shown(name, test[name]) == words


def test_better_is_higher():
    assert metrics.goodness({"test_perplexity": 3.0}) > metrics.goodness({"test_perplexity": 4.0})
    assert metrics.goodness({"test_accuracy": 0.9}) > metrics.goodness({"test_accuracy": 0.8})
    assert metrics.goodness({}) is None
