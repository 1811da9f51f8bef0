"""What holds for every model: one row of scores per sample, no mixing, arguments are checked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpsgd import engines, losses
from dpsgd.models import CNN, LSTM, MLP, Linear, Transformer, WideResNet

IMAGE = (1, 8, 8)
MODELS = {
    "linear": lambda: Linear(IMAGE, 10),
    "mlp": lambda: MLP(IMAGE, 10, widths=[12, 6]),
    "cnn": lambda: CNN(IMAGE, 10, channels=[4, 3], kernel_size=[3, 4]),
    "lstm": lambda: LSTM(IMAGE, 10, hidden_size=6),
    "transformer": lambda: Transformer(IMAGE, 10, width=8, heads=2, depth=1),
    "wide_resnet": lambda: WideResNet(IMAGE, 10, depth=10, width=1, groups=4),
}
WITH_DROPOUT = {
    "mlp": lambda: MLP(IMAGE, 10, widths=[64], dropout=0.5),
    "cnn": lambda: CNN(IMAGE, 10, dropout=0.5),
    "lstm": lambda: LSTM(IMAGE, 10, dropout=0.5),
    "transformer": lambda: Transformer(IMAGE, 10, dropout=0.5),
}
STANDARD = nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.LSTM

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_one_row_of_scores_per_sample(name):
    assert MODELS[name]()(torch.randn(5, *IMAGE)).shape == (5, 10)


@every_model
def test_samples_do_not_mix(name):
    model, x = MODELS[name]().double(), torch.randn(5, *IMAGE, dtype=torch.float64)
    torch.testing.assert_close(model(x)[3:4], model(x[3:4]))


@every_model
def test_parameters_live_in_standard_layers(name):
    owners = [m for m in MODELS[name]().modules() if list(m.parameters(recurse=False))]
    assert owners
    assert all(type(owner) in STANDARD for owner in owners)


@every_model
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_agrees_with_the_loop(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    batch = torch.randn(3, *IMAGE, dtype=torch.float64), torch.tensor([0, 9, 4])
    got = engines.Vmap(model, losses.cross_entropy)(batch).materialize()
    expected = engines.Loop(model, losses.cross_entropy)(batch).materialize()
    for parameter, grad in expected.items():
        torch.testing.assert_close(got[parameter], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_acts_in_training_only(name):
    torch.manual_seed(0)
    model, x = WITH_DROPOUT[name](), torch.randn(2, *IMAGE)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("build", [Linear, MLP, CNN, LSTM, Transformer])
def test_no_classes_means_one_output(build):
    assert build((1, 6, 6), None)(torch.randn(2, 1, 6, 6)).shape == (2, 1)


@pytest.mark.parametrize("build", [Linear, MLP, CNN, LSTM, Transformer, WideResNet])
@pytest.mark.parametrize(
    ("input_shape", "num_classes", "named"),
    [((1, 0, 8), 10, "input_shape"), ((1, 8.0, 8), 10, "input_shape"), (IMAGE, 0, "num_classes")],
)
def test_shapes_and_classes_are_checked(build, input_shape, num_classes, named):
    with pytest.raises(ValueError, match=f"Expected {named}.* positive integer"):
        build(input_shape, num_classes)


@pytest.mark.parametrize("build", [MLP, CNN, Transformer, WideResNet])
def test_an_unknown_activation_lists_the_choices(build):
    with pytest.raises(
        ValueError,
        match="relu, tanh, gelu, silu, elu, or the numbers of a tempered sigmoid, got swish",
    ):
        build(IMAGE, 10, activation="swish")


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "silu", "elu"])
def test_activations_by_name(activation):
    assert MLP([4], 2, [3], activation)(torch.randn(2, 4)).shape == (2, 2)


@pytest.mark.parametrize("build", [MLP, CNN, LSTM, Transformer])
@pytest.mark.parametrize("dropout", [1.0, -0.1])
def test_dropout_is_a_probability(build, dropout):
    with pytest.raises(ValueError, match="0 <= dropout < 1"):
        build(IMAGE, 10, dropout=dropout)
