"""Every loss: one number per sample, from the sample's own positions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from dpsgd import losses


def identity(x, **_):
    return x


def test_cross_entropy_is_one_loss_per_sample():
    scores, labels = torch.randn(5, 3), torch.randint(3, (5,))
    expected = F.cross_entropy(scores, labels, reduction="none")
    torch.testing.assert_close(losses.cross_entropy(identity, (scores, labels)), expected)


def test_cross_entropy_averages_over_positions():
    scores, labels = torch.randn(5, 3, 4, 2), torch.randint(3, (5, 4, 2))
    expected = F.cross_entropy(scores, labels, reduction="none").mean((1, 2))
    torch.testing.assert_close(losses.cross_entropy(identity, (scores, labels)), expected)


def test_cross_entropy_counts_only_labelled_positions():
    scores, labels = torch.randn(2, 3, 4), torch.tensor([[0, -100, 2, -100], [1, 1, 0, 2]])
    first = F.cross_entropy(scores[0, :, [0, 2]].T, labels[0, [0, 2]])
    assert losses.cross_entropy(identity, (scores, labels))[0].item() == pytest.approx(
        first.item(), rel=1e-6
    )


def test_cross_entropy_of_a_fully_ignored_sample_is_zero():
    scores = torch.randn(2, 3, 4, requires_grad=True)
    labels = torch.tensor([[-100] * 4, [1, 1, 0, 2]])
    values = losses.cross_entropy(identity, (scores, labels))
    values.sum().backward()
    assert values[0] == 0
    assert scores.grad[0].eq(0).all()


def test_cross_entropy_of_an_ignored_single_label_is_zero():
    values = losses.cross_entropy(identity, (torch.randn(2, 3), torch.tensor([-100, 1])))
    assert values[0] == 0
    assert values[1] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_is_computed_in_float32(dtype):
    scores, labels = torch.randn(5, 300).to(dtype), torch.randint(300, (5,))
    values = losses.cross_entropy(identity, (scores, labels))
    expected = F.cross_entropy(scores.float(), labels, reduction="none")
    torch.testing.assert_close(values, expected)


def test_cross_entropy_keeps_float64():
    values = losses.cross_entropy(identity, (torch.randn(2, 3).double(), torch.tensor([0, 1])))
    assert values.dtype == torch.float64


def test_cross_entropy_refuses_floating_labels():
    with pytest.raises(ValueError, match="Expected integer labels"):
        losses.cross_entropy(identity, (torch.randn(2, 3), torch.randn(2)))


def test_cross_entropy_refuses_classes_last():
    with pytest.raises(ValueError, match="Move the classes"):
        losses.cross_entropy(identity, (torch.randn(2, 4, 3), torch.zeros(2, 4).long()))


def test_mse_averages_over_outputs():
    outputs, targets = torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    expected = (outputs - targets).square().mean((1, 2))
    torch.testing.assert_close(losses.mse(identity, (outputs, targets)), expected)


def test_mse_drops_a_last_dimension_of_one():
    outputs, targets = torch.randn(5, 1), torch.randn(5)
    expected = (outputs[:, 0] - targets).square()
    torch.testing.assert_close(losses.mse(identity, (outputs, targets)), expected)


@pytest.mark.parametrize("loss", [losses.mse, losses.binary_cross_entropy])
def test_targets_are_never_broadcast(loss):
    with pytest.raises(ValueError, match="Expected one output per target"):
        loss(identity, (torch.randn(5, 3), torch.ones(5)))


def test_binary_cross_entropy_takes_integer_answers():
    logits, answers = torch.randn(5, 1), torch.tensor([0, 1, 1, 0, 1])
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], answers.float(), reduction="none")
    torch.testing.assert_close(losses.binary_cross_entropy(identity, (logits, answers)), expected)


def test_binary_cross_entropy_averages_over_questions():
    logits, answers = torch.randn(5, 4), torch.randint(2, (5, 4))
    values = losses.binary_cross_entropy(identity, (logits, answers))
    expected = F.binary_cross_entropy_with_logits(logits[2], answers[2].float())
    torch.testing.assert_close(values[2], expected)


class LanguageModel(nn.Module):
    """Scores from the current token alone; the output type is that of Hugging Face if asked."""

    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 7)
        self.wrapped = wrapped

    def forward(self, input_ids, attention_mask=None):
        logits = self.table(input_ids)
        return SimpleNamespace(logits=logits) if self.wrapped else logits


def next_token_losses(model, ids):
    """[B, T - 1], position t predicting token t + 1."""
    logits = model.table(ids)[:, :-1].transpose(1, 2)
    return F.cross_entropy(logits, ids[:, 1:], reduction="none")


@pytest.mark.parametrize("wrapped", [False, True])
def test_causal_lm_predicts_the_next_token(wrapped):
    model, ids = LanguageModel(wrapped), torch.randint(7, (3, 5))
    expected = next_token_losses(model, ids).mean(1)
    torch.testing.assert_close(losses.causal_lm(model, ids), expected)
    torch.testing.assert_close(losses.causal_lm(model, {"input_ids": ids}), expected)


@pytest.mark.parametrize("mask", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
def test_causal_lm_skips_padding_on_either_side(mask):
    model, ids = LanguageModel(), torch.randint(7, (1, 5))
    batch = {"input_ids": ids, "attention_mask": torch.tensor([mask])}
    kept = ids[:, torch.tensor(mask).bool()]
    expected = next_token_losses(model, kept).mean(1)
    torch.testing.assert_close(losses.causal_lm(model, batch), expected)


def test_causal_lm_skips_ignored_labels():
    model, ids = LanguageModel(), torch.randint(7, (1, 5))
    labels = ids.clone()
    labels[:, :3] = -100
    expected = next_token_losses(model, ids)[:, 2:].mean(1)
    values = losses.causal_lm(model, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(values, expected)


def test_causal_lm_without_any_attended_pair_is_zero():
    mask = torch.tensor([[0, 0, 0, 1]])
    batch = {"input_ids": torch.randint(7, (1, 4)), "attention_mask": mask}
    assert losses.causal_lm(LanguageModel(), batch).tolist() == [0.0]


def test_causal_lm_refuses_single_tokens():
    with pytest.raises(ValueError, match="T >= 2"):
        losses.causal_lm(LanguageModel(), torch.zeros(3, 1).long())


def pairs(shape, targets):
    return nn.Linear(4, 3), (torch.randn(5, *shape, 4), targets)


class ClassesFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x).transpose(1, 2)


IDS = torch.randint(7, (5, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * n + [0] * (6 - n) for n in (6, 5, 2, 1, 0)])
VMAPPED = {
    "cross_entropy": (losses.cross_entropy, *pairs((), torch.tensor([0, 1, 2, 1, -100]))),
    "cross_entropy_positions": (
        losses.cross_entropy,
        ClassesFirst(),
        (torch.randn(5, 6, 4), torch.where(MASK == 1, IDS % 3, -100)),
    ),
    "mse": (losses.mse, *pairs((2,), torch.randn(5, 2, 3))),
    "binary_cross_entropy": (
        losses.binary_cross_entropy,
        *pairs((2,), torch.ones(5, 2, 3).long()),
    ),
    "causal_lm": (losses.causal_lm, LanguageModel(), IDS),
    "causal_lm_mapping": (
        losses.causal_lm,
        LanguageModel(wrapped=True),
        {"input_ids": IDS, "attention_mask": MASK, "labels": IDS},
    ),
}


@pytest.mark.parametrize("case", VMAPPED)
def test_gradients_under_vmap_with_batches_of_one(case):
    loss_fn, model, batch = VMAPPED[case]
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss_of_one(parameters, sample):
        one = torch.utils._pytree.tree_map(lambda leaf: leaf[None], sample)
        view = lambda *args, **kwargs: functional_call(model, parameters, args, kwargs)  # noqa: E731
        return loss_fn(view, one)[0]

    per_sample = vmap(grad(loss_of_one), in_dims=(None, 0))(parameters, batch)
    summed = torch.autograd.grad(loss_fn(model, batch).sum(), list(model.parameters()))
    for got, expected in zip(per_sample.values(), summed, strict=True):
        torch.testing.assert_close(got.sum(0), expected)


def test_causal_lm_takes_ids_with_labels():
    model, ids = LanguageModel(), torch.randint(7, (3, 5))
    labels = ids.clone()
    labels[0, 2:] = losses.IGNORED
    expected = losses.causal_lm(model, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(losses.causal_lm(model, (ids, labels)), expected)


@pytest.mark.parametrize("labels", [torch.zeros(3).long(), torch.zeros(3, 5)])
def test_causal_lm_refuses_labels_that_are_not_one_per_token(labels):
    with pytest.raises(ValueError, match="one integer label per token id"):
        losses.causal_lm(LanguageModel(), (torch.zeros(3, 5).long(), labels))


def test_nats_and_tokens_of_each_sequence():
    model, ids = LanguageModel(), torch.randint(7, (3, 5))
    labels = ids.clone()
    labels[1, 3:] = losses.IGNORED
    nats, counted = losses.next_token_nats(model, (ids, labels))
    assert counted.tolist() == [4, 2, 4]
    torch.testing.assert_close(nats / counted, losses.causal_lm(model, (ids, labels)))


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.mse, losses.binary_cross_entropy])
def test_scores_may_be_the_logits_of_an_output(loss):
    x, y = torch.randn(4, 3), torch.rand(4, 3)
    if loss is losses.cross_entropy:
        y = torch.randint(3, (4,))
    wrapped = loss(lambda x: SimpleNamespace(logits=x), (x, y))
    torch.testing.assert_close(wrapped, loss(identity, (x, y)))


def test_an_output_without_logits_is_refused():
    with pytest.raises(ValueError, match="a tensor, or an output with logits, got tuple"):
        losses.cross_entropy(lambda x: (x, x), (torch.randn(2, 3), torch.zeros(2).long()))
