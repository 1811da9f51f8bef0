"""A run in somebody else's loop: its batches, and what it refuses."""

import subprocess
import sys

import pytest
import torch
from loops import NOISE, plan_of, trained_by_hand
from torch.utils.data import IterableDataset, TensorDataset

from dpsgd import clipping, engines, losses, noise, sampling
from dpsgd.integrations import PrivateRun
from dpsgd.plan import PrivacyPlan

X, Y = torch.randn(40, 3, dtype=torch.float64), torch.arange(40) % 2
RECORDS = TensorDataset(X, Y)
MADE_UP = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])


def run_of(plan, **options):
    options = {"synthetic_batch": MADE_UP, "noise": noise.Gaussian(NOISE), **options}
    return PrivateRun(plan, losses.cross_entropy, **options)


def model_of():
    torch.manual_seed(1)
    return torch.nn.Linear(3, 2).double()


def started(run, model=None):
    model = model_of() if model is None else model
    run.begin(model, torch.optim.SGD(model.parameters(), lr=0.5))
    return model


def take_all(run, rows, **options):
    loader = run.batches(RECORDS, physical_batch_size=rows, **options)
    model = started(run)
    while run.steps_taken < run.plan.num_steps:
        for drawn in loader:
            run.take(drawn)
    return list(model.parameters())


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_it_equals_a_plain_loop_whatever_is_in_memory_at_once(rows):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected = trained_by_hand(plan_of(), model, losses.cross_entropy, (X, Y), optimizer)
    torch.testing.assert_close(take_all(run_of(plan_of()), rows), expected, rtol=0, atol=1e-10)


def test_workers_change_nothing():
    expected = take_all(run_of(plan_of()), 4)
    found = take_all(run_of(plan_of()), 4, num_workers=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_clip_norm_that_is_learned_is_learned():
    run = run_of(plan_of(policy=clipping.AdaptiveQuantile(0.5)))
    take_all(run, 4)
    assert run.step.clipping.max_grad_norm != 0.5


def test_an_epoch_goes_on_where_the_last_one_ended_and_the_last_one_ends_with_the_plan():
    run = run_of(plan_of(num_steps=7))
    loader = run.batches(RECORDS, physical_batch_size=4)
    started(run)
    epochs = []
    for _ in range(3):
        epochs.append([])
        for drawn in loader:
            epochs[-1].append(drawn.step)
            run.take(drawn)
    assert len(loader) == 5
    assert epochs == [[0, 1, 2, 3, 4], [5, 6], []]


def test_the_physical_batches_are_of_one_size():
    loader = run_of(plan_of(sample_rate=0.5)).batches(RECORDS, physical_batch_size=4)
    for drawn in loader:
        for (x, y), mask in drawn.parts:
            assert len(x) == len(y) == len(mask) == 4
            assert not x[~mask].any()


def test_an_empty_draw_releases_noise_alone():
    plan = plan_of(num_steps=1, sample_rate=0.02, key=bytes(31) + b"\x01")
    assert not len(plan.sampler.sample(0, len(X)))
    run = run_of(plan)
    (drawn,) = run.batches(RECORDS, physical_batch_size=4)
    assert drawn.parts == ()
    model = started(run)
    before = [p.detach().clone() for p in model.parameters()]
    run.take(drawn)
    sums = {str(i): torch.zeros_like(p) for i, p in enumerate(before)}
    noise.Gaussian(NOISE).add_(sums, plan.noise_multiplier * 0.5, 0)
    expected = [p - 0.5 * s / plan.expected_batch_size for p, s in zip(before, sums.values())]
    torch.testing.assert_close(list(model.parameters()), expected, rtol=0, atol=1e-12)


def test_a_batch_is_taken_once():
    run = run_of(plan_of())
    loader = run.batches(RECORDS, physical_batch_size=4)
    started(run)
    drawn = next(iter(loader))
    run.take(drawn)
    with pytest.raises(ValueError, match="once and in order"):
        run.take(drawn)
    assert run.steps_taken == 1


def test_batches_of_others_are_refused():
    run = run_of(plan_of())
    started(run)
    with pytest.raises(ValueError, match=r"each batch of PrivateRun\.batches"):
        run.take((X, Y))


def test_the_budget_ends_it():
    run = run_of(plan_of(num_steps=2))
    take_all(run, 4)
    assert run.steps_taken == 2
    assert run.epsilon == pytest.approx(run.plan.epsilon(), rel=1e-9)
    with pytest.raises(ValueError, match="2 of the 2 steps of its plan are spent"):
        started(run)


def test_nothing_is_spent_before_it_begins():
    assert run_of(plan_of()).epsilon == 0


def test_a_failing_step_releases_nothing_and_leaves_nothing():
    run = run_of(plan_of())
    loader = run.batches(RECORDS, physical_batch_size=2)
    model = started(run)
    drawn = next(iter(loader))
    model.train(False)
    with pytest.raises(ValueError, match="train mode"):
        run.take(drawn)
    assert run.steps_taken == 0
    assert not run.step.parallel.pending


def test_users_are_refused():
    sampler = sampling.UserPoisson(sample_rate=0.2, public_size=40, records_per_user=2)
    plan = PrivacyPlan.make(
        sampler, clipping.Flat(1.0), num_steps=2, target_delta=1e-3, noise_multiplier=1.0
    )
    with pytest.raises(ValueError, match=r"dpsgd\.trainer\.Trainer for user-level privacy"):
        run_of(plan)


def test_records_without_positions_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            raise AssertionError("a record was used")

    with pytest.raises(ValueError, match="map-style"):
        run_of(plan_of()).batches(Stream(), physical_batch_size=4)


def test_a_size_that_is_not_the_declared_one_is_refused_where_it_must_be():
    sampler = sampling.Shuffled(expected_batch_size=10, public_size=50)
    plan = PrivacyPlan.make(
        sampler,
        clipping.Flat(1.0),
        num_steps=2,
        target_delta=1e-3,
        noise_multiplier=4.0,
        adjacency="replace_one",
    )
    with pytest.raises(ValueError, match="as declared"):
        run_of(plan).batches(RECORDS, physical_batch_size=4)


def test_packed_records_are_refused():
    def packed(records):
        return torch.stack([x for x, _ in records]).flatten()[None]

    loader = run_of(plan_of()).batches(RECORDS, physical_batch_size=4, collate_fn=packed)
    with pytest.raises(ValueError, match="one row per record"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)), "GroupNorm"),
        (torch.nn.Linear(3, 2).eval(), "train mode"),
    ],
)
def test_models_that_cannot_be_trained_privately_are_refused(model, words):
    run = run_of(plan_of())
    with pytest.raises(ValueError, match=words):
        started(run, model)
    assert run.step is None


def test_a_loss_that_mixes_the_samples_is_refused():
    def mixing(model, batch):
        return losses.cross_entropy(model, (batch[0] - batch[0].mean(0), batch[1]))

    run = PrivateRun(plan_of(), mixing, synthetic_batch=MADE_UP, engine=engines.Loop)
    with pytest.raises(ValueError):  # noqa: PT011 - the words are those of preflight
        started(run)


def test_a_synthetic_batch_is_needed():
    with pytest.raises(ValueError, match="synthetic_batch"):
        started(run_of(plan_of(), synthetic_batch=None))


def test_a_library_is_imported_by_its_module_alone_and_missed_by_name():
    code = (
        "import importlib, sys\n"
        "sys.modules['transformers'] = sys.modules['lightning'] = None\n"
        "import dpsgd.integrations\n"
        "for name, library, extra in (\n"
        "    ('lightning', 'lightning', 'lightning'), ('huggingface', 'transformers', 'hf')\n"
        "):\n"
        "    try:\n"
        "        importlib.import_module('dpsgd.integrations.' + name)\n"
        "    except ImportError as error:\n"
        "        assert f\"pip install 'dpsgd[{extra}]'\" in str(error), error\n"
        "        assert library in str(error), error\n"
        "    else:\n"
        "        raise SystemExit('it was imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
