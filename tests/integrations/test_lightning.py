"""Lightning's trainer: the same weights as a plain loop, and what is refused."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from loops import NOISE, plan_of, trained_by_hand
from torch.utils.data import DataLoader, TensorDataset

from dpsgd import losses, noise
from dpsgd.integrations import PrivateRun

pl = pytest.importorskip("lightning.pytorch")
from dpsgd.integrations.lightning import PrivateTraining  # noqa: E402

X, Y = torch.randn(40, 3, dtype=torch.float64), torch.arange(40) % 2
RECORDS = TensorDataset(X, Y)
MADE_UP = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])


class Classifier(pl.LightningModule):
    """A module as users have it."""

    def __init__(self, scheduler=None):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Linear(3, 2)
        self.scheduler = scheduler

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        raise AssertionError("a record was used outside of the plan")

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}


def run_of(plan=None, synthetic_batch=MADE_UP):
    return PrivateRun(
        plan_of() if plan is None else plan,
        losses.cross_entropy,
        synthetic_batch=synthetic_batch,
        noise=noise.Gaussian(NOISE),
    )


def trainer_of(run, tmp_path, *, callbacks=(), **settings):
    settings = {"max_steps": run.plan.num_steps, "precision": "64-true", **settings}
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, **settings}
    return pl.Trainer(
        callbacks=[PrivateTraining(run), *callbacks],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Counted(torch.utils.data.Dataset):
    """Records that nobody may look at."""

    def __len__(self):
        return 40

    def __getitem__(self, position):
        raise AssertionError("a record was used")


def refused(words, tmp_path, *, module=None, run=None, callbacks=(), fit=None, **settings):
    run = run_of() if run is None else run
    trainer = trainer_of(run, tmp_path, callbacks=callbacks, **settings)
    loader = run.batches(Counted(), physical_batch_size=4)
    with pytest.raises(ValueError, match=words):
        trainer.fit(Classifier() if module is None else module, loader, **(fit or {}))
    assert run.steps_taken == 0


@pytest.mark.parametrize("rows", [1, 100])
def test_it_equals_a_plain_loop(tmp_path, rows):
    module = Classifier().double()
    expected = trained_by_hand(
        plan_of(), module, losses.cross_entropy, (X, Y), module.configure_optimizers()
    )
    run, module = run_of(), Classifier()
    trainer = trainer_of(run, tmp_path)
    trainer.fit(module, run.batches(RECORDS, physical_batch_size=rows))
    torch.testing.assert_close(list(module.parameters()), expected, rtol=0, atol=1e-10)
    assert trainer.global_step == run.steps_taken == run.plan.num_steps


@pytest.mark.parametrize(("interval", "rate"), [("step", 0.1 * 0.5**3), ("epoch", 0.1 * 0.5)])
def test_schedulers_are_stepped_as_configured(tmp_path, interval, rate):
    def scheduler(optimizer):
        halving = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"scheduler": halving, "interval": interval, "frequency": 2}

    run, module = run_of(plan_of(num_steps=7)), Classifier(scheduler)
    trainer = trainer_of(run, tmp_path)
    trainer.fit(module, run.batches(RECORDS, physical_batch_size=4))
    found = trainer.optimizers[0].param_groups[0]["lr"]
    # five steps an epoch: 2 epochs; steps are counted within an epoch, as by the trainer itself
    assert found == pytest.approx(rate, rel=1e-12)


def test_an_empty_draw_releases_noise_alone(tmp_path):
    plan = plan_of(num_steps=1, sample_rate=0.02, key=bytes(31) + b"\x01")
    assert not len(plan.sampler.sample(0, 40))
    run, module = run_of(plan), Classifier()
    before = module.net.weight.detach().clone()
    trainer_of(run, tmp_path).fit(module, run.batches(Counted(), physical_batch_size=4))
    assert run.steps_taken == 1
    assert not torch.equal(before, module.net.weight.float())


def test_nothing_private_is_logged_and_epsilon_is(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    run, module = run_of(), Classifier()
    trainer = trainer_of(run, tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(module, run.batches(RECORDS, physical_batch_size=4), DataLoader(RECORDS, 10))
    logged = {name for row in trainer.logger.experiment.metrics for name in row}
    logged |= set(trainer.callback_metrics) | set(trainer.progress_bar_metrics)
    assert logged == {"epsilon", "val_loss"}
    assert float(trainer.callback_metrics["epsilon"]) == pytest.approx(run.plan.epsilon(), rel=1e-6)


def test_the_module_is_given_back(tmp_path):
    run, module = run_of(), Classifier()
    trainer_of(run, tmp_path).fit(module, run.batches(RECORDS, physical_batch_size=4))
    assert "training_step" not in vars(module)
    assert module.automatic_optimization
    assert module.training


def test_a_second_fit_raises(tmp_path):
    run, module = run_of(), Classifier()
    trainer_of(run, tmp_path).fit(module, run.batches(RECORDS, physical_batch_size=4))
    with pytest.raises(ValueError, match="7 of the 7 steps of its plan are spent"):
        trainer_of(run, tmp_path).fit(module, run.batches(Counted(), physical_batch_size=4))


def test_stopping_early_spends_less(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    run = run_of()
    trainer = trainer_of(run, tmp_path, callbacks=[Stop()])
    trainer.fit(Classifier(), run.batches(RECORDS, physical_batch_size=4))
    assert run.steps_taken == 3
    assert run.epsilon < run.plan.epsilon()


def test_a_checkpoint_is_tested_but_not_resumed(tmp_path):
    run, module = run_of(), Classifier()
    saving = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    trainer = trainer_of(run, tmp_path, callbacks=[saving], enable_checkpointing=True)
    trainer.fit(module, run.batches(RECORDS, physical_batch_size=4))
    trainer.validate(module, DataLoader(RECORDS, 10), ckpt_path=saving.last_model_path)
    refused(
        "Expected a new run, got ckpt_path", tmp_path, fit={"ckpt_path": saving.last_model_path}
    )


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("gradient_clip_val=None, got 1.0", {"gradient_clip_val": 1.0}),
        ("accumulate_grad_batches=1, got 2", {"accumulate_grad_batches": 2}),
        ("precision=.*got bf16-mixed.*Autocast", {"precision": "bf16-mixed"}),
        ("precision=.*got 16-true", {"precision": "16-true"}),
        ("limit_train_batches=1.0, got 1", {"limit_train_batches": 1}),
        ("limit_train_batches=1.0, got 0.5", {"limit_train_batches": 0.5}),
        ("overfit_batches=0.0, got 2", {"overfit_batches": 2}),
        ("fast_dev_run=False", {"fast_dev_run": True}),
        ("max_steps=7, got -1", {"max_steps": -1}),
        ("max_steps=7, got 8", {"max_steps": 8}),
        ("max_epochs=-1, got 1.*takes 2 epochs", {"max_epochs": 1}),
    ],
)
def test_settings_that_would_break_the_plan_are_refused(tmp_path, words, settings):
    refused(words, tmp_path, **settings)


def test_several_devices_are_refused(tmp_path):
    run = run_of()
    trainer = trainer_of(run, tmp_path, strategy="ddp", devices=2)
    with pytest.raises(ValueError, match=r"strategy=.*DDPStrategy of 2 .*parallel=ddp"):
        PrivateTraining(run).setup(trainer, Classifier(), "fit")


@pytest.mark.parametrize(
    "callback",
    [
        pl.callbacks.LearningRateFinder(),
        pl.callbacks.BatchSizeFinder(),
        pl.callbacks.StochasticWeightAveraging(0.1),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_add_steps_are_refused(tmp_path, callback):
    run, module = run_of(), Classifier()
    loader = run.batches(Counted(), physical_batch_size=4)
    module.train_dataloader, module.batch_size = (lambda: loader), 4
    with pytest.raises(ValueError, match=f"got {type(callback).__name__}"):
        trainer_of(run, tmp_path, callbacks=[callback]).fit(module)
    assert run.steps_taken == 0


def test_batches_of_others_are_refused(tmp_path):
    run = run_of()
    with pytest.raises(ValueError, match=r"Pass run\.batches"):
        trainer_of(run, tmp_path).fit(Classifier(), DataLoader(Counted(), 4))
    assert run.steps_taken == 0


def test_hooks_that_would_not_run_are_refused(tmp_path):
    class Clipping(Classifier):
        def configure_gradient_clipping(self, *_):
            pass

    refused("without configure_gradient_clipping", tmp_path, module=Clipping())

    class Watching(Classifier):
        def on_after_backward(self): ...

    refused("without on_after_backward", tmp_path, module=Watching())


def test_optimisation_by_hand_is_refused(tmp_path):
    module = Classifier()
    module.automatic_optimization = False
    refused("automatic_optimization=True", tmp_path, module=module)


def test_a_rate_that_follows_a_metric_is_refused(tmp_path):
    def scheduler(optimizer):
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"scheduler": plateau, "monitor": "val_loss"}

    refused("ReduceLROnPlateau", tmp_path, module=Classifier(scheduler))


def test_batch_norm_and_eval_mode_are_refused(tmp_path):
    module = Classifier()
    module.net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    refused("GroupNorm", tmp_path, module=module)
    refused("train mode", tmp_path, module=Classifier().eval())
    assert "training_step" not in vars(module)


def test_a_failing_fit_gives_the_module_back(tmp_path):
    def broken(records):
        raise RuntimeError("no such file")

    run, module = run_of(), Classifier()
    loader = run.batches(RECORDS, physical_batch_size=4, collate_fn=broken)
    with pytest.raises(RuntimeError, match="no such file"):
        trainer_of(run, tmp_path).fit(module, loader)
    assert "training_step" not in vars(module)
    assert module.automatic_optimization
