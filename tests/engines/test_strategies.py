"""Strategies of the ghost engine: exact, chosen from shapes alone, remembered, within memory."""

import json

import pytest
import torch
from cases import CASES, ZOO, refusal, squares
from torch import nn

from dpsgd.engines import Ghost, Loop
from dpsgd.engines.ghost import strategies
from dpsgd.engines.ghost.strategies import KNOWN, Strategies, _Memory
from dpsgd.engines.ghost.timings import cache_dir

FORCED = [name for name in KNOWN if name not in strategies.SHARE and name != "formulas"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPSGD_CACHE", str(tmp_path / "cache"))


class Wide(nn.Module):
    """Layers large enough to be timed, small enough for a test."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.linear = nn.Linear(16, 24)
        self.head = nn.Linear(24, 2)

    def forward(self, x):
        rows = self.conv(x).flatten(2)  # [B, 8, 256]
        return self.head(self.linear(rows.unflatten(2, (16, 16)).flatten(1, 2)).tanh())


def wide(dtype=torch.float64, size=64):
    torch.manual_seed(0)
    return Wide().to(dtype), torch.randn(size, 4, 16, 16, dtype=dtype)


def assert_agrees(grads, reference):
    torch.testing.assert_close(grads.norms(), reference.norms(), rtol=1e-10, atol=1e-12)
    weights = torch.linspace(0, 1, len(reference.losses), dtype=torch.float64)
    expected = reference.weighted_sum(weights)
    for name, total in grads.weighted_sum(weights).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(total, expected[name], rtol=1e-10, atol=1e-10 * scale)


def chosen(engine, x):
    return {name: s.name for name, s in engine(x)._parts[0].chosen.items()}


@pytest.mark.parametrize("choice", ["fastest", "lean"])
def test_what_is_timed_is_exact_at_the_first_call_and_after(choice):
    model, x = wide()
    reference = Loop(model, squares)(x)
    engine = Ghost(model, squares, strategy=choice)
    for _ in range(3):
        assert_agrees(engine(x), reference)
    names = chosen(engine, x)
    assert {"conv.weight", "linear.weight"} <= names.keys()
    assert set(names.values()) <= set(FORCED)


@pytest.mark.parametrize("strategy", FORCED)
@pytest.mark.parametrize(
    "case",
    [c for c in CASES + ZOO if not refusal(c.name, "ghost", torch.float64)][::3],
    ids=lambda case: case.name,
)
def test_every_strategy_is_exact_on_models(case, strategy):
    model, loss, batch = case.build(torch.float64)
    reference = Loop(model, loss)(batch)
    groups = [[name] for name in reference.materialize()]
    grads = Ghost(model, loss, strategy=strategy)(batch)
    tolerance = 1e-10 if case.inside in (None, torch.float64) else 1e-4
    weights = torch.linspace(0, 1.5, 5, dtype=torch.float64)
    expected = reference.norms(groups)
    scale = max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(
        grads.norms(groups), expected, rtol=tolerance, atol=tolerance * scale, check_dtype=False
    )
    sums = reference.weighted_sum(weights)
    scale = max(total.abs().max().item() for total in sums.values() if total.numel())
    for name, total in grads.weighted_sum(weights).items():
        torch.testing.assert_close(
            total, sums[name], rtol=tolerance, atol=tolerance * scale, check_dtype=False
        )


@pytest.mark.parametrize("strategy", [*FORCED, "fastest"])
@pytest.mark.parametrize("layout", ["input", "weight", "permuted"])
def test_channels_last_is_exact(strategy, layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, 2))
    model, x = model.double(), torch.randn(64, 4, 16, 16, dtype=torch.float64)
    if layout == "weight":
        model = model.to(memory_format=torch.channels_last)
    elif layout == "input":
        x = x.to(memory_format=torch.channels_last)
    else:
        x = x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    engine, reference = Ghost(model, squares, strategy=strategy), Loop(model, squares)(x)
    for _ in range(2):
        assert_agrees(engine(x), reference)


@pytest.mark.parametrize("strategy", [*FORCED, "fastest"])
def test_sequences_of_any_layout_are_exact(strategy):
    """Time first in memory, every other feature, one position for all."""
    torch.manual_seed(0)
    model, whole = nn.Linear(24, 40).double(), torch.randn(20, 128, 48, dtype=torch.float64)
    engine = Ghost(model, squares, strategy=strategy)
    for x in (
        whole[..., :24].transpose(0, 1).contiguous().permute(1, 0, 2).permute(1, 0, 2),
        whole.transpose(0, 1)[..., ::2],
        whole[:, :1, :24].transpose(0, 1).expand(50, 20, 24),
    ):
        reference = Loop(model, squares)(x)
        for _ in range(2):
            assert_agrees(engine(x), reference)


@pytest.mark.parametrize("strategy", FORCED)
def test_no_weighted_row_is_longer_than_the_clip_norm_whatever_the_strategy(strategy):
    """In float32, on sequences that cancel: w_i g_i, as it is summed, has norm C at most."""
    torch.manual_seed(0)
    v, u = 1e3 * torch.randn(3, 64, 16), torch.zeros(3, 64, 16)
    u[:, 0, 0] = 25.0
    x = torch.stack([v + u, u - v], 2).flatten(1, 2)
    model = nn.Linear(16, 8, bias=False)
    grads = Ghost(model, lambda m, b: m(b).sum((1, 2)), strategy=strategy)(x)
    factors = 1.0 / grads.norms()[:, 0]
    for sample in range(3):
        weights = torch.zeros(3)
        weights[sample] = factors[sample]
        row = grads.weighted_sum(weights)["weight"].double().norm()
        assert row <= 1 + 1e-5


def test_plans_come_from_made_up_tensors(monkeypatch):
    """Nothing that is timed holds a value of the batch, which is NaN throughout here."""
    timed = []
    watch = strategies._Watch._seconds

    def spy(self, what, best):
        timed.extend(self._calls)
        return watch(self, what, best)

    monkeypatch.setattr(strategies._Watch, "_seconds", spy)
    model, x = wide(torch.float32, size=128)
    Ghost(model, squares)(x * float("nan")).norms()
    assert timed
    for call in timed:
        for tensor in (call.g, *(call[name] for name in call.samples)):
            assert torch.isfinite(tensor).all()


def test_timing_leaves_the_random_state_alone():
    model, x = wide()
    torch.manual_seed(5)
    Ghost(model, squares)(x).norms()
    after = torch.rand(1)
    torch.manual_seed(5)
    assert after == torch.rand(1)


def test_times_are_remembered_by_other_engines_and_processes(monkeypatch):
    model, x = wide()
    first = chosen(Ghost(model, squares), x)
    (file,) = cache_dir().glob("strategies-*.json")
    assert all(min(times.values()) > 0 for times in json.loads(file.read_text()).values())
    monkeypatch.setattr(strategies._Watch, "time", None)  # nothing may be timed again
    assert chosen(Ghost(model, squares), x) == first


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 3}', '{"key": {"gram": "fast"}}'])
def test_a_broken_cache_is_done_without(content):
    model, x = wide()
    Ghost(model, squares)(x)
    (file,) = cache_dir().glob("strategies-*.json")
    file.write_text(content)
    engine = Ghost(model, squares)
    assert_agrees(engine(x), Loop(model, squares)(x))
    assert json.loads(file.read_text())


def test_a_cache_with_strategies_of_another_version_is_timed_again():
    model, x = wide()
    first = chosen(Ghost(model, squares), x)
    (file,) = cache_dir().glob("strategies-*.json")
    times = {key: {"magic": 1e-9} for key in json.loads(file.read_text())}
    file.write_text(json.dumps(times))
    assert chosen(Ghost(model, squares), x).keys() == first.keys()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPSGD_CACHE", str(tmp_path / "file" / "below"))
    model, x = wide()
    assert_agrees(Ghost(model, squares)(x), Loop(model, squares)(x))


def test_without_time_for_timing_formulas_decide(monkeypatch):
    monkeypatch.setattr(strategies, "MAX_SECONDS", 0.0)
    model, x = wide()
    engine = Ghost(model, squares)
    assert chosen(engine, x) == {}
    assert_agrees(engine(x), Loop(model, squares)(x))


@pytest.mark.parametrize("choice", ["fast", "", None, 3])
def test_an_unknown_strategy_is_refused_by_name(choice):
    with pytest.raises(ValueError, match="Expected strategy to be one of fastest, lean, formulas"):
        Ghost(nn.Linear(2, 2), squares, strategy=choice)


def test_routes_tell_the_strategy():
    model, x = wide()
    routes = Ghost(model, squares, strategy="gram")(x).routes()
    assert routes["linear.weight"] == "linear, gram"
    assert routes["head.bias"] == "linear"


def test_parts_of_a_batch_are_not_timed(monkeypatch):
    """How many samples go one way depends on what they hold: only whole batches may be timed."""
    timed = []
    watch = strategies._Watch.__init__

    def spy(self, use, call, size):
        timed.append(call.size)
        watch(self, use, call, size)

    monkeypatch.setattr(strategies._Watch, "__init__", spy)

    class Branching(Wide):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-2 * x)

    torch.manual_seed(0)
    model, x = Branching().double(), torch.randn(128, 4, 16, 16, dtype=torch.float64)
    x[:100] = x[:100].abs()
    x[100:] = -x[100:].abs()
    engine = Ghost(model, squares)
    assert_agrees(engine(x), Loop(model, squares)(x))
    assert timed == []
    assert_agrees(engine(x.abs()), Loop(model, squares)(x.abs()))
    assert set(timed) == {128}


def test_what_does_not_fit_while_it_is_timed_is_not_taken(monkeypatch):
    def fails(self, form, call):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(strategies._Watch, "_kept", fails)
    model, x = wide()
    names = chosen(Ghost(model, squares), x)
    assert names
    assert not any(name.startswith("keep") for name in names.values())


def test_gradients_are_kept_only_as_far_as_memory_allows():
    class Some:
        """A use that holds 10 bytes per sample; its gradient takes `formed`."""

        def __init__(self, formed):
            self.bytes_held, self.bytes_formed = 10, formed
            self.call = type("Call", (), {"g": torch.zeros(1, 5, dtype=torch.int8)})

    uses = {"a": [Some(8)], "b": [Some(30)], "c": [Some(3000)]}
    memory = _Memory(uses, size=1 << 22, activations=60)
    assert memory.allows("a", 1.25)  # no more than what it replaces
    assert memory.allows("b", 1.25)
    assert not memory.allows("c", 1.25)
    assert not _Memory(uses, size=1 << 22, activations=40).allows("b", 1.1)


def test_strategies_are_pickled_without_what_was_measured():
    import pickle

    copy = pickle.loads(pickle.dumps(Strategies("lean")))
    assert copy._choice == "lean"


def test_repeated_steps_hold_no_more_and_no_more():
    import gc

    model, x = wide()
    engine = Ghost(model, squares)
    counts = []
    for _ in range(6):
        engine(x).weighted_sum(torch.ones(len(x)))
        gc.collect()
        counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert counts[-1] <= counts[2]


def test_a_gradient_that_comes_after_its_norm_was_settled_is_an_error(monkeypatch):
    """It would be missing from the norm, and the sample would not be clipped enough."""
    from dpsgd.engines.ghost.part import Part

    take = Part.take

    def twice(self, record):
        take(self, record)
        take(self, record)

    monkeypatch.setattr(Part, "take", twice)
    with pytest.raises(ValueError, match="more gradients than the forward pass made calls"):
        Ghost(nn.Linear(3, 2).double(), squares)(torch.randn(4, 3, dtype=torch.float64))
