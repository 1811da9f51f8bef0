"""`python -m dpsgd.train`: trains a model with differential privacy."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dpsgd import checks, cli, rng
from dpsgd.components import build
from dpsgd.config import fixed_key, placement, redacted
from dpsgd.data import Dataset
from dpsgd.loggers import (
    JsonLines,
    Logger,
    TensorBoard,
    private_scalars,
    public_scalars,
    speed_scalar,
)
from dpsgd.plan import PrivacyPlan, steps_for
from dpsgd.private_step import PrivateStep
from dpsgd.report import banner, final_report, summary
from dpsgd.run_directory import METRICS, RunDirectory, load_weights
from dpsgd.sampling import Poisson
from dpsgd.seeding import seed_everything
from dpsgd.trainer import StepReport, Trainer

_KEY_FIXED = "privacy.key is fixed: whoever knows it can subtract the noise."


def train(config: DictConfig, path: Path, console: Console) -> dict[str, Any]:
    """Trains as the configuration says and returns the final report.

    Everything is checked before the run directory is made and before a record is used.

    Args:
        config: A resolved configuration.
        path: The run's directory.
        console: Where the progress and the summary go.

    Raises:
        ValueError: If the configuration, the data or the model is unsound.
    """
    key = fixed_key(config)
    not_private = [] if key is None else [_KEY_FIXED]
    key = rng.fresh_key() if key is None else key
    trainer, passed = _prepare(config, key)
    if not_private:
        console.print(banner(not_private))
    run = RunDirectory(path)
    run.keep_key(key)
    try:
        run.save_config(redacted(config))
        report = _train(trainer, run, config, console, not_private, passed)
    finally:
        run.destroy_key()
    console.print(summary(report, str(path)))
    return report


def _prepare(config: DictConfig, key: bytes) -> tuple[Trainer, checks.Preflight]:
    """Builds and checks everything that a run needs."""
    place = placement(config)
    seed_everything(config.seed)
    parts = build(config)
    data = parts["data"]
    if not isinstance(data, Dataset):
        raise ValueError(f"Expected data to be a dpsgd.data.Dataset, got {type(data).__name__}.")
    model = place.model(parts["model"])
    if config.model.init_from is not None:
        load_weights(model, config.model.init_from)
    engine = parts["engine"](model, parts["loss"])
    passed = checks.preflight(engine, place.batch(checks.synthetic_batch(data, 4)))
    sampler = parts["sampler"](key=rng.derive(key, "sampler"))
    if not isinstance(sampler, Poisson):
        raise ValueError(f"Expected a Poisson sampler, got {type(sampler).__name__}.")
    plan = _plan(config, sampler)
    step = PrivateStep(
        engine,
        parts["optimizer"](list(engine.parameters.values())),
        clipping=parts["clipping"],
        noise=parts["noise"](key=rng.derive(key, "noise")),
        noise_multiplier=plan.noise_multiplier,
        expected_batch_size=plan.expected_batch_size,
    )
    trainer = Trainer(
        step,
        sampler,
        data,
        plan,
        physical_batch_size=config.trainer.physical_batch_size,
        evaluate_every=config.trainer.evaluate_every,
    )
    return trainer, passed


def _plan(config: DictConfig, sampler: Poisson) -> PrivacyPlan:
    num_steps, epochs = config.trainer.num_steps, config.trainer.epochs
    if (num_steps is None) == (epochs is None):
        raise ValueError("Expected either trainer.num_steps or trainer.epochs.")
    assert sampler.sample_rate is not None
    if sampler.expected_batch_size is None:
        raise ValueError("Expected a declared public size of the data, got none.")
    return PrivacyPlan.make(
        sample_rate=sampler.sample_rate,
        expected_batch_size=sampler.expected_batch_size,
        num_steps=steps_for(epochs, sampler.sample_rate) if num_steps is None else num_steps,
        delta=config.privacy.target_delta,
        target_epsilon=config.privacy.target_epsilon,
        noise_multiplier=config.privacy.noise_multiplier,
        adjacency=config.privacy.adjacency,
        accountant=config.accountant.name,
    )


def _train(
    trainer: Trainer,
    run: RunDirectory,
    config: DictConfig,
    console: Console,
    not_private: list[str],
    passed: checks.Preflight,
) -> dict[str, Any]:
    """Runs the trainer to its end or to Ctrl-C; saves the model either way."""
    with console.status("accounting: epsilon of every step"):
        trainer.plan.epsilon(1)
    start = time.perf_counter()
    test: dict[str, float] = {}
    public, private = _loggers(run, config)
    interrupted = False
    with public[0], public[1], _progress(console) as progress:
        task = progress.add_task("training", total=trainer.plan.num_steps, status="")
        try:
            for report in trainer.run():
                test.update(report.test)
                for logger in public:
                    logger.log(report.step, public_scalars(report))
                for logger in private:
                    logger.log(report.step, private_scalars(report))
                progress.update(task, completed=report.step, status=_status(report, test))
        except KeyboardInterrupt:
            interrupted = True
        steps, seconds = trainer.step.step, time.perf_counter() - start
        for logger in public:
            logger.log(steps, speed_scalar(steps, trainer.plan.expected_batch_size, seconds))
    for logger in private:
        logger.close()
    final = final_report(
        trainer.plan,
        trainer.step.engine,
        passed.routes,
        max_grad_norm=trainer.step.clipping.sensitivity,
        steps_taken=steps,
        test=test,
        seconds=seconds,
        interrupted=interrupted,
        not_private=not_private,
    )
    run.save_model(trainer.step.engine.model)
    run.save_report(final)
    return final


def _loggers(run: RunDirectory, config: DictConfig) -> tuple[list[Logger], list[Logger]]:
    public: list[Logger] = [JsonLines(run.path / METRICS)]
    public.append(TensorBoard(run.path / "tensorboard"))
    if not config.logger.diagnostics:
        return public, []
    return public, [
        JsonLines(run.private / "diagnostics.jsonl"),
        TensorBoard(run.private / "tensorboard"),
    ]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _status(report: StepReport, test: dict[str, float]) -> str:
    accuracy = f", accuracy {test['test_accuracy']:.1%}" if "test_accuracy" in test else ""
    return f"epsilon <= {report.epsilon:.2f}{accuracy}"


def main() -> None:
    """The command."""
    torch.set_float32_matmul_precision("highest")
    console = Console()

    def task(config: DictConfig) -> None:
        report = train(config, cli.run_path(config.run.dir), console)
        if report["interrupted"]:
            raise KeyboardInterrupt

    cli.run(task, "train")


if __name__ == "__main__":
    main()
