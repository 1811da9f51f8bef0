"""Options of models from the literature: standardised weights, tempered sigmoids, fixed filters."""

import pytest
import torch
from cases import ENGINES
from torch import nn

from dpsgd import engines, losses
from dpsgd.models import CNN, MLP, FilterBank, WideResNet
from dpsgd.models.arguments import TemperedSigmoid
from dpsgd.models.filters import gabor
from dpsgd.models.standardised import StandardisedConv2d
from dpsgd.models.trainable import train_only

IMAGE = (1, 8, 8)
MODELS = {
    "standardised_cnn": lambda: CNN(IMAGE, 3, [4], 3, groups=2, weight_standardisation=True),
    "standardised_wrn": lambda: WideResNet(
        IMAGE, 3, depth=10, width=1, groups=4, weight_standardisation=True
    ),
    "group_norm": lambda: CNN(IMAGE, 3, [4], 3, groups=2),
    "tempered": lambda: MLP(
        IMAGE, 3, [5], {"scale": 1.58, "inverse_temperature": 3.0, "offset": 0.71}
    ),
    "filters": lambda: FilterBank(IMAGE, 3),
}


@pytest.mark.parametrize("engine", [n for n in ENGINES if n not in ("opacus-ew", "opacus-ghost")])
@pytest.mark.parametrize("name", MODELS)
def test_engines_agree_or_refuse_by_name(name, engine):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    batch = torch.randn(5, *IMAGE).double(), torch.arange(5) % 3
    expected = engines.Loop(model, losses.cross_entropy)(batch).materialize()
    made = ENGINES[engine](model, losses.cross_entropy)
    if engine == "hooks" and "standardised" in name:
        with pytest.raises(ValueError, match=r"StandardisedConv2d.*engine=ghost"):
            made(batch)
        return
    for key, found in made(batch).materialize().items():
        torch.testing.assert_close(found, expected[key], rtol=1e-10, atol=1e-13, msg=key)


def test_standardised_weights_have_mean_zero_and_variance_one_over_fan_in():
    conv = StandardisedConv2d(3, 5, 3, bias=False).double()
    with torch.no_grad():
        conv.weight.mul_(7).add_(2)
    x = torch.zeros(1, 3, 5, 5).double()
    x[0, 1, 2, 2] = 1  # an impulse shows the weights, mirrored
    seen = conv(x)[0].flip(-1, -2)
    w = conv.weight[:, 1]
    fan_in = conv.weight[0].numel()
    flat = conv.weight.flatten(1)
    mean, std = flat.mean(1), flat.std(1, correction=0)
    expected = (w - mean[:, None, None]) / (std * fan_in**0.5)[:, None, None]
    torch.testing.assert_close(seen, expected)


def test_scale_and_offset_of_the_weights_do_not_matter():
    conv, x = StandardisedConv2d(2, 3, 3).double(), torch.randn(2, 2, 6, 6).double()
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(5).sub_(0.3)
    torch.testing.assert_close(conv(x), before)


def test_tanh_is_a_tempered_sigmoid():
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(TemperedSigmoid(2.0, 2.0, 1.0)(x), x.tanh())


@pytest.mark.parametrize(
    "activation",
    [{"scale": 1.0}, {"scale": "a", "inverse_temperature": 1.0, "offset": 0.0},
     {"scale": -1.0, "inverse_temperature": 1.0, "offset": 0.0},
     {"scale": 1.0, "inverse_temperature": 0.0, "offset": 0.0},
     {"scale": 1.0, "inverse_temperature": 1.0, "offset": float("nan")}],
)  # fmt: skip
def test_senseless_numbers_of_a_tempered_sigmoid_are_refused(activation):
    with pytest.raises(ValueError, match="tempered sigmoid"):
        MLP(IMAGE, 3, [4], activation)


def test_filters_are_fixed_unit_waves_without_a_mean():
    bank = gabor(orientations=4, scales=2)
    assert bank.shape[0] == 16
    torch.testing.assert_close(bank.flatten(1).norm(dim=1), torch.ones(16))
    assert bank.sum((1, 2)).abs().max() < 1e-5
    model = FilterBank(IMAGE, 10)
    assert [name for name, _ in model.named_parameters()] == ["head.weight", "head.bias"]
    assert torch.equal(model.bank, FilterBank(IMAGE, 3).bank)


def test_a_constant_image_has_no_waves_and_a_shift_of_it_changes_no_modulus():
    model = FilterBank((2, 8, 8), 10, orientations=3)
    found = model.features(torch.full((1, 2, 8, 8), 3.0))
    assert found.shape == (1, 2 * 4, 8, 8)
    torch.testing.assert_close(found[:, :2], torch.full((1, 2, 8, 8), 3.0))
    assert found[:, 2:].abs().max() < 1e-3


def test_stripes_excite_the_wave_that_runs_across_them():
    x = torch.cos(0.75 * torch.pi * torch.arange(16.0)).expand(1, 1, 16, 16)
    found = FilterBank((1, 16, 16), 10).features(x)[0, 1:].mean((1, 2))
    assert int(found.argmax()) == 0, "direction 0 runs along x"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"pool": 9}, "pool"), ({"groups": 4}, "groups"), ({"orientations": 0}, "orientations")],
)
def test_bad_filters_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        FilterBank(IMAGE, 10, **options)


def test_biases_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    train_only(model, "*bias")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.bias", "2.bias"]
    grads = engines.Ghost(model, losses.cross_entropy)((torch.randn(5, 4), torch.arange(5) % 2))
    assert set(grads.materialize()) == {"0.bias", "2.bias"}


def test_frozen_parameters_stay_frozen():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].bias.requires_grad_(False)
    train_only(model, ["*bias", "1.*"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.bias", "1.weight"]


def test_patterns_that_match_nothing_are_named():
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"'head\.\*' matches none of weight, bias"):
        train_only(model, ["head.*"])
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="leaves none"):
        train_only(model, "weight")
    with pytest.raises(ValueError, match="3 matches none of"):
        train_only(model, 3)
