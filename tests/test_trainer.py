"""The training loop."""

import dataclasses

import pytest
import torch
import worlds

from dpsgd import checks, clipping, engines, losses
from dpsgd.plan import PrivacyPlan, steps_for
from dpsgd.precision import Autocast
from dpsgd.sampling import Poisson
from dpsgd.schedules import Schedule
from dpsgd.trainer import Trainer


def trained(physical, engine=engines.Vmap, rate=0.7, steps=6):
    trainer, _ = worlds.trainer(
        worlds.vectors, engine, torch.float64, rate=rate, steps=steps, physical=physical
    )
    object.__setattr__(
        trainer.data, "train", (trainer.data.train[0].double(), trainer.data.train[1])
    )
    reports = list(trainer.run())
    return trainer.step.engine.model, reports


@pytest.mark.parametrize("engine", [engines.Loop, engines.Hooks, engines.Vmap, engines.Opacus])
@pytest.mark.parametrize("physical", [1, 3, 100])
def test_the_result_does_not_depend_on_the_physical_batch_size(engine, physical):
    expected, _ = trained(5, engines.Loop)
    actual, _ = trained(physical, engine)
    for p, q in zip(expected.parameters(), actual.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


PRECISIONS = {  # parameters, loss, and how far rounding takes the weights of six steps
    "float32": (torch.float32, losses.cross_entropy, 1e-5),
    "autocast": (torch.float32, Autocast(losses.cross_entropy), 1e-3),
    "bfloat16": (torch.bfloat16, losses.cross_entropy, 2**-6),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", [engines.Ghost, engines.Hooks, engines.Vmap])
@pytest.mark.parametrize("physical", [1, 3, 64])
def test_nor_does_it_in_less_precision(engine, physical, precision):
    """In bfloat16 a weight may go to the neighbouring number, once or twice."""
    dtype, loss, tolerance = PRECISIONS[precision]
    weights = []
    for rows in (5, physical):
        trainer, _ = worlds.trainer(
            worlds.vectors, engine, dtype, rate=0.7, steps=6, physical=rows, loss=loss
        )
        list(trainer.run())
        weights.append([p.detach().double() for p in trainer.step.engine.model.parameters()])
    for p, q in zip(*weights):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_a_run_repeats_bit_for_bit_with_its_key_and_seed():
    for p, q in zip(trained(5)[0].parameters(), trained(5)[0].parameters()):
        assert torch.equal(p, q)


def test_training_ends_at_the_budget():
    trainer, noise = worlds.trainer(worlds.vectors, engines.Vmap, torch.float32, steps=4)
    reports = list(trainer.run())
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert list(trainer.run()) == []
    assert len(noise.released) == 4
    epsilons = [report.epsilon for report in reports]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == trainer.plan.epsilon()


def test_leaving_the_loop_early_spends_no_more_than_was_released():
    trainer, noise = worlds.trainer(worlds.vectors, engines.Vmap, torch.float32, steps=4)
    for report in trainer.run():
        if report.step == 2:
            break
    assert trainer.step.step == len(noise.released) == 2
    assert [report.step for report in trainer.run()] == [3, 4]


def test_learning_happens():
    torch.manual_seed(0)
    trainer, _ = worlds.trainer(
        worlds.vectors, engines.Hooks, torch.float32, steps=150, noise_multiplier=0.01
    )
    losses = [report.private["train_loss"] for report in trainer.run()]
    assert losses[-1] < 0.8 * losses[0]


def test_eval_mode_is_refused():
    trainer, _ = worlds.trainer(worlds.vectors, engines.Vmap, torch.float32)
    trainer.step.engine.model.eval()
    with pytest.raises(ValueError, match="train mode"):
        Trainer(trainer.step, trainer.data, trainer.plan, physical_batch_size=2)


def test_evaluation_leaves_the_model_in_train_mode():
    trainer, _ = worlds.trainer(worlds.vectors, engines.Vmap, torch.float32, steps=2)
    object.__setattr__(trainer.data, "test", trainer.data.train)
    reports = list(trainer.run())
    assert set(reports[-1].test) == {"test_loss", "test_accuracy"}
    assert reports[0].test == {}
    assert trainer.step.engine.model.training


def test_evaluation_takes_no_more_rows_than_training():
    """Who has memory for three rows has it for three rows of the test set."""
    trainer, _ = worlds.trainer(worlds.vectors, engines.Vmap, torch.float32, physical=3)
    object.__setattr__(trainer.data, "test", trainer.data.train)
    rows = []
    trainer.step.engine.model.register_forward_pre_hook(lambda module, x: rows.append(len(x[0])))
    (report,) = trainer.run()
    assert report.test
    assert max(rows) == 3


def test_dropout_is_on_in_training_and_off_in_evaluation():
    modes = []

    def build():
        model, schema, x = worlds.vectors()
        model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
        return model, schema, x

    trainer, _ = worlds.trainer(build, engines.Hooks, torch.float32)
    object.__setattr__(trainer.data, "test", trainer.data.train)
    list(trainer.run())
    assert modes[0]
    assert not modes[-1]


CONTRADICTIONS = {
    "noise_multiplier": {"noise_multiplier": 0.9},
    "noise_schedule": {"noise_schedule": Schedule({0: 1.0, 1: 2.0})},
    "expected_batch_size": {"sampler": Poisson(sample_rate=0.5, public_size=12)},
    "clipping": {"clipping": clipping.Flat(2.0)},
}


@pytest.mark.parametrize("field", CONTRADICTIONS)
def test_a_plan_that_contradicts_the_step_is_refused(field):
    trainer, _ = worlds.trainer(worlds.vectors, engines.Vmap, torch.float32)
    plan = dataclasses.replace(trainer.plan, **CONTRADICTIONS[field])
    with pytest.raises(ValueError, match=f"Expected {field}="):
        Trainer(trainer.step, trainer.data, plan, physical_batch_size=2)


@pytest.mark.parametrize("setting", ["physical_batch_size", "evaluate_every"])
def test_sizes_must_be_positive(setting):
    trainer, _ = worlds.trainer(worlds.vectors, engines.Vmap, torch.float32)
    sizes = {"physical_batch_size": 2, "evaluate_every": 2, setting: 0}
    with pytest.raises(ValueError, match=setting):
        Trainer(trainer.step, trainer.data, trainer.plan, **sizes)


def test_no_fraction_of_an_epoch_is_lost():
    assert steps_for(1, 0.3) == 4
    assert steps_for(3, 1.0) == 3
    assert steps_for(10, 0.1) == 100
    with pytest.raises(ValueError, match="epochs"):
        steps_for(0, 0.1)


def test_a_plan_without_noise_or_steps_is_refused():
    good = {
        "sampler": Poisson(sample_rate=0.1, public_size=100),
        "clipping": clipping.Flat(1.0),
        "num_steps": 5,
        "noise_multiplier": 1.0,
        "target_delta": 1e-5,
    }
    for change, words in (
        ({"noise_multiplier": 0.0}, "Without noise"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"sampler": Poisson(sample_rate=0.1)}, "public_size"),
        ({"target_delta": 0.0}, "delta"),
        ({"target_delta": 0.01}, "random record"),
        ({"noise_multiplier": 1e-4}, "infinite"),
    ):
        with pytest.raises(ValueError, match=words):
            PrivacyPlan(**{**good, **change})


def test_a_plan_made_for_a_target_does_not_exceed_it():
    sampler = Poisson(sample_rate=0.1, public_size=100)
    plan = PrivacyPlan.make(
        sampler, clipping.Flat(1.0), num_steps=20, target_delta=1e-5, target_epsilon=2.0
    )
    assert 1.99 < plan.epsilon() <= 2.0
    assert plan.spent(20) == plan.epsilon()


@pytest.mark.parametrize("engine", [engines.Hooks, engines.Opacus])
def test_engines_probe_synthetic_records_only(engine):
    """A refusal that depended on a private record would leak it."""
    trainer, _ = worlds.trainer(worlds.vectors, engine, torch.float32, steps=2)
    seen = []
    plain = trainer.step.engine.loss_fn

    def loss(model, batch):
        seen.append(len(batch[0]))
        return plain(model, batch)

    trainer.step.engine.loss_fn = loss
    checks.preflight(trainer.step.engine, checks.synthetic_batch(trainer.data, 4))
    seen.clear()
    list(trainer.run())
    assert set(seen) == {trainer.physical_batch_size}
