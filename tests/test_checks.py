"""Checks before any privacy is spent, and the users' own agreement check."""

import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, ENGINES, labelled_loss, squares
from torch import nn

from dpsgd import checks, engines, losses
from dpsgd.testing import assert_engines_agree


def batch(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class FunctionalBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return F.batch_norm(self.layer(x), None, None, training=True)


class Subclass(nn.BatchNorm1d):
    pass


NORMS = {
    "plain": lambda: nn.BatchNorm1d(4),
    "not_affine": lambda: nn.BatchNorm1d(4, affine=False),
    "no_statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "frozen": lambda: nn.BatchNorm1d(4).requires_grad_(False),
    "subclass": lambda: Subclass(4),
    "functional": FunctionalBatchNorm,
}


@pytest.mark.parametrize("engine", [engines.Loop, engines.Ghost, engines.Hooks, engines.Vmap])
@pytest.mark.parametrize("norm", NORMS)
def test_batch_normalisation_is_refused_in_every_disguise(norm, engine):
    model = nn.Sequential(nn.Linear(4, 4), NORMS[norm](), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"GroupNorm"):
        checks.preflight(engine(model, squares), batch(4, 4))


def test_the_module_where_samples_meet_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ValueError, match=r"first meet in '1' \(BatchNorm1d\)"):
        checks.check_independence(model, squares, batch(4, 4))


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, b: squares(m, b).mean().expand(len(b)),
        lambda m, b: squares(m, b) - squares(m, b).mean(),
        lambda m, b: squares(m, b).softmax(0),
        lambda m, b: (m(b) @ m(b).T).logsumexp(1),
    ],
    ids=["mean", "centred", "softmax", "contrastive"],
)
def test_a_loss_that_couples_samples_is_refused(loss):
    with pytest.raises(ValueError, match="in the forward pass or the loss function"):
        checks.check_independence(nn.Linear(4, 3), loss, batch(4, 4))


def test_reshaping_a_time_major_batch_mixes_samples_and_is_caught():
    """Transposing [T, B, d] keeps the samples together, reshaping it does not."""
    time_major = torch.arange(8).reshape(2, 4)  # T = 2, B = 4: sample i is column i
    assert time_major.transpose(0, 1)[1].tolist() == [1, 5]
    assert time_major.reshape(4, 2)[1].tolist() == [2, 3]

    class Model(nn.Module):
        def __init__(self, mixing):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.mixing = mixing

        def forward(self, x):  # [B, T, d]
            steps = x.transpose(0, 1)
            size = len(x), x.shape[1], x.shape[2]
            rows = steps.reshape(size) if self.mixing else steps.transpose(0, 1)
            return self.layer(rows)

    data = batch(4, 2, 4)
    checks.check_independence(Model(mixing=False), squares, data)
    assert_engines_agree(Model(mixing=False), squares, data)
    with pytest.raises(ValueError, match="never reshape"):
        checks.check_independence(Model(mixing=True), squares, data)
    with pytest.raises(AssertionError, match="disagree"):
        assert_engines_agree(Model(mixing=True), squares, data)


def test_state_that_moves_in_a_forward_pass_is_named_and_put_back():
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.1), nn.Flatten(), nn.Linear(12, 2))
    kept = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"0\.weight"):
        checks.check_unchanged_state(model, squares, torch.randint(7, (4, 3)))
    assert torch.equal(model[0].weight, kept)
    norm = nn.InstanceNorm1d(3, track_running_stats=True)
    with pytest.raises(ValueError, match="running_mean"):
        checks.check_unchanged_state(norm, squares, batch(4, 3, 5))
    assert torch.equal(norm.running_mean, torch.zeros(3))


def test_dropout_is_no_reason_for_refusal():
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 2))
    random = torch.random.get_rng_state()
    for engine in (engines.Ghost, engines.Hooks, engines.Vmap, engines.Opacus):
        checks.preflight(engine(model, squares), batch(4, 4))
        assert_engines_agree(model, squares, batch(4, 4), [engine])
    assert torch.equal(random, torch.random.get_rng_state())
    assert model.training


def test_dropout_inside_a_recurrent_network_is_switched_off_and_back():
    lstm = nn.LSTM(4, 3, num_layers=2, dropout=0.5, batch_first=True)
    x = batch(4, 5, 4)
    with checks.without_dropout(lstm):
        torch.testing.assert_close(lstm(x)[0], lstm(x)[0])
    assert lstm.dropout == 0.5
    assert not torch.equal(lstm(x)[0], lstm(x)[0])


def test_a_model_that_does_not_fit_the_data_is_named_before_training():
    with pytest.raises(ValueError, match=r"shapes \[\[4, 4\]\], got RuntimeError: mat1 and mat2"):
        checks.preflight(engines.Vmap(nn.Linear(5, 2), squares), batch(4, 4))


def test_a_wrong_engine_is_found():
    class Wrong(engines.Loop):
        def _compute(self, batch, size, parameters):
            grads = super()._compute(batch, size, parameters)
            grads._held["bias"] = grads._held["bias"] * 1.01
            return grads

    class Lying(engines.Engine):
        def _compute(self, batch, size, parameters):
            return Wrong(self.model, self.loss_fn)._compute(batch, size, parameters)

    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"'bias' differ by 1\.0e-02"):
        checks.check_agreement(Lying(model, squares), batch(4, 4))
    with pytest.raises(AssertionError, match="Lying and Loop disagree in the norms"):
        assert_engines_agree(model, squares, batch(4, 4), [Lying])


def test_assert_engines_agree_reports_refusals():
    case = next(case for case in CASES if case.name == "attention")
    model, loss, data = case.build(torch.float64)
    verdicts = assert_engines_agree(model, loss, data)
    assert verdicts["Vmap"] == "agrees"
    assert "No rule" in verdicts["Hooks"]


def test_assert_engines_agree_leaves_model_and_batch_as_found():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    data = (batch(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    copies = data[0].clone()
    assert_engines_agree(model, labelled_loss, data)
    assert torch.equal(data[0], copies)
    assert not any(p.grad is not None for p in model.parameters())


def test_a_batch_of_one_tells_nothing():
    for check in (checks.check_independence, assert_engines_agree):
        with pytest.raises(ValueError, match="at least 2"):
            check(nn.Linear(4, 3), squares, batch(1, 4))


class SeparateAttention(nn.Module):
    """The bias of the keys has a gradient that is zero but for rounding."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return ((self.q(x) @ self.k(x).transpose(1, 2) / 4).softmax(-1) @ self.v(x)).mean(1)


@pytest.mark.parametrize("engine", [engines.Ghost, engines.Hooks, engines.Vmap])
def test_gradients_that_are_zero_but_for_rounding_are_no_disagreement(engine):
    checks.preflight(engine(SeparateAttention(), squares), batch(4, 5, 16))
    assert_engines_agree(SeparateAttention(), squares, batch(4, 5, 16), [engine])


def test_a_buffer_that_is_reassigned_is_noticed_and_put_back():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return self.layer(x)

    model = Average()
    with pytest.raises(ValueError, match="mean"):
        checks.check_unchanged_state(model, squares, batch(4, 3))
    assert not model.mean.any()


def test_a_model_may_refuse_rows_out_of_its_range():
    checks.check_independence(
        nn.Linear(4, 3), lambda m, b: squares(m, torch.bernoulli(b)), torch.rand(4, 4)
    )


def test_gradients_that_samples_share_without_their_losses_showing_it_are_found():
    def loss(model, x):
        own = squares(model, x)
        return own + own.mean() - own.mean().detach()

    model = nn.Linear(4, 3).double()
    checks.check_independence(model, loss, batch(4, 4).double())
    with pytest.raises(ValueError, match="not those that each sample has alone"):
        checks.preflight(engines.Ghost(model, loss), batch(4, 4).double())


class Scaled(engines.Engine):
    """Ghost gradients with one thing wrong."""

    wrong = "materialize"

    def _compute(self, batch, size, parameters):
        grads = engines.Ghost(self.model, self.loss_fn)._compute(batch, size, parameters)
        return Wrong(grads, self.wrong)


class Wrong(engines.PerSampleGrads):
    def __init__(self, grads, wrong):
        like = {name: torch.empty(shape) for name, shape in grads._shapes.items()}
        super().__init__(like, grads._size)
        self.grads, self.wrong = grads, wrong

    def _losses(self):
        return self.grads._losses()

    def _squared_norms(self):
        factor = 0.9 if self.wrong == "norms" else 1.0
        return {name: square * factor for name, square in self.grads._squared_norms().items()}

    def _add_weighted_sum(self, columns, out, beta):
        factor = 1.1 if self.wrong == "sums" else 1.0
        scaled = {name: column * factor for name, column in columns.items()}
        self.grads._add_weighted_sum(scaled, out, beta)

    def _materialize(self):
        return {
            name: torch.zeros_like(grad) if self.wrong == "missed" and name == "bias" else grad
            for name, grad in self.grads._materialize().items()
        }

    def _dot(self, direction):
        return self.grads._dot(direction)

    def _gram(self, names):
        return self.grads._gram(names)

    def _routes(self):
        return self.grads._routes()

    def _release(self):
        pass


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("norms", "norms of 'weight'|norms of 'bias'"),
        ("sums", "weighted sums of"),
        ("missed", "per-sample gradients of 'bias'"),
    ],
)
def test_wrong_norms_sums_and_missed_parameters_are_named(wrong, words):
    engine = Scaled(nn.Linear(4, 3), squares)
    engine.wrong = wrong
    with pytest.raises(ValueError, match=words):
        checks.preflight(engine, batch(4, 4))


def test_a_missed_use_does_not_add_up():
    engine = Scaled(nn.Linear(4, 3), squares)
    engine.wrong = "missed"
    with pytest.raises(ValueError, match=r"add up to autograd's gradient.*'bias'"):
        checks.check_coverage(engine, batch(4, 4))


def test_preflight_tells_the_route_of_each_parameter():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.MultiheadAttention(4, 2)
    )

    def loss(m, x):
        return squares(lambda y: m[1](*[m[0](y)[None]] * 3)[0].transpose(0, 1), x)

    passed = checks.preflight(engines.Ghost(model, loss), batch(4, 4))
    assert passed.engine == "Ghost"
    assert passed.routes["0.parametrizations.weight.original1"] == "linear (computed)"
    assert passed.routes["1.in_proj_weight"] == "linear"
    assert "1.in_proj_weight" in str(passed)
    assert set(checks.preflight(engines.Vmap(model, loss), batch(4, 4)).routes.values()) == {
        "formed"
    }


def test_replaced_batch_norms_pass_preflight_and_keep_their_parameters():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6, affine=False)),
        nn.Flatten(),
        nn.Linear(54, 40),
        nn.BatchNorm1d(40),
        nn.Linear(40, 2),
    )
    scale = model[1].weight
    model[2].append(model[1])
    assert checks.replace_batch_norm(model) == ["1", "5", "2.1", "2.2"]
    assert model[1].weight is scale
    assert model[2][2] is model[1]
    assert (model[1].num_groups, model[5].num_groups) == (3, 20)
    checks.preflight(engines.Ghost(model, squares), batch(4, 2, 5, 5))
    with pytest.raises(ValueError, match="one itself"):
        checks.replace_batch_norm(nn.BatchNorm1d(3))


def test_dropout_inside_attention_is_switched_off():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True).double()
    x = batch(4, 5, 8).double()
    with checks.without_dropout(model):
        torch.testing.assert_close(model(x), model(x))
    for engine in (engines.Ghost, engines.Vmap):
        checks.preflight(engine(model, squares), x)


def test_random_numbers_of_python_and_numpy_are_replayed():
    def loss(model, x):
        return squares(model, x) * random.random() * numpy.random.rand()

    states = random.getstate(), numpy.random.get_state()[1].copy()
    checks.check_independence(nn.Linear(4, 3), loss, batch(4, 4))
    assert random.getstate() == states[0]
    assert (numpy.random.get_state()[1] == states[1]).all()
    generator = torch.Generator()
    with pytest.raises(ValueError, match="two passes over one batch"):
        checks.check_independence(
            nn.Linear(4, 3),
            lambda m, x: squares(m, x) + torch.rand(4, generator=generator),
            batch(4, 4),
        )


def test_losses_that_reach_no_parameter_are_refused():
    with pytest.raises(ValueError, match="all gradients are zero"):
        checks.preflight(
            engines.Ghost(nn.Linear(4, 3), lambda m, b: m(b).detach().sum(1)), batch(4, 4)
        )


def test_batches_with_booleans_are_checked():
    """Which records of a user are there, for example."""
    model = nn.Linear(3, 2)
    present = torch.tensor([True, False, True, True])

    def loss(model, batch):
        x, there = batch
        return torch.where(there, model(x).square().sum(1), 0)

    checks.check_independence(model, loss, (torch.randn(4, 3), present))
    with pytest.raises(ValueError, match="independent samples"):
        checks.check_independence(
            model, lambda m, b: m(b[0]).square().sum(1) * b[1].sum(), (torch.randn(4, 3), present)
        )


def test_synthetic_labels_per_token_do_not_count_at_padding():
    from dpsgd.data import stories

    data = stories("public", [24], 230, 230, public_size=5, num_train=2)
    x, y = checks.synthetic_batch(data, 4)
    assert x.shape == y.shape == (4, 24)
    assert (y == losses.IGNORED).any()
    assert (x[y == losses.IGNORED] == 0).all()
    assert not (checks.synthetic_batch(data, 4, padded=False)[1] == losses.IGNORED).any()


class Spoiled(engines.Engine):
    """Right for finite samples; 0 * NaN spreads to all rows otherwise."""

    def _compute(self, batch, size, parameters):
        losses = self.loss_fn(self.model, batch)
        rows = torch.autograd.grad(
            losses, list(parameters.values()), torch.eye(size), is_grads_batched=True
        )
        return engines.DenseGrads(losses, dict(zip(parameters, rows)))


def test_an_engine_that_lets_nan_spread_is_refused():
    model = torch.nn.Linear(4, 3)
    batch = torch.randn(5, 4), torch.arange(5) % 3
    with pytest.raises(ValueError, match="Spoiled to keep a sample with NaN apart"):
        checks.preflight(Spoiled(model, losses.cross_entropy), batch)


@pytest.mark.parametrize("engine", [n for n in ENGINES if n != "opacus-ghost"])
def test_the_engines_keep_nan_apart(engine):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
    batch = torch.randn(5, 4), torch.arange(5) % 3
    checks.check_containment(ENGINES[engine](model, losses.cross_entropy), batch)
    assert batch[0].isfinite().all()
