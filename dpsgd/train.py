"""`python -m dpsgd.train`: trains a model with differential privacy."""

from __future__ import annotations

import time
from collections.abc import Callable
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
from dpsgd.accounting import Releases
from dpsgd.components import build
from dpsgd.config import fixed_key, placement, redacted
from dpsgd.data import Dataset
from dpsgd.ledger import Ledger
from dpsgd.loggers import (
    JsonLines,
    Logger,
    TensorBoard,
    private_scalars,
    public_scalars,
    speed_scalar,
)
from dpsgd.losses import PerUser
from dpsgd.planning import privacy_plan
from dpsgd.random_stopping import run_candidates
from dpsgd.report import banner, caution, final_report, summary
from dpsgd.run_directory import (
    METRICS,
    RunDirectory,
    charged,
    load_weights,
    write_report,
)
from dpsgd.sampling import UserPoisson
from dpsgd.seeding import seed_everything
from dpsgd.trainer import StepReport, Trainer

_KEY_FIXED = "privacy.key is fixed: whoever knows it can subtract the noise."


def train(
    config: DictConfig, path: Path, console: Console, key: bytes | None = None
) -> dict[str, Any]:
    """Trains as the configuration says and returns the final report.

    Everything is checked before the run directory is made and before a record is used.

    Args:
        config: A resolved configuration.
        path: The run's directory.
        console: Where the progress and the summary go.
        key: The run's key; by default the configuration's, or a fresh one.

    Raises:
        ValueError: If the configuration, the data or the model is unsound.
    """
    fixed = fixed_key(config)
    not_private = [] if fixed is None else [_KEY_FIXED]
    key = key or fixed or rng.fresh_key()
    trainer, passed = prepare(config, key)
    if not_private:
        console.print(banner(not_private))
    if trainer.plan.sampler.caution is not None:
        console.print(caution(trainer.plan.sampler.caution))
    run = RunDirectory(path)
    run.keep_key(key)
    try:
        run.save_config(redacted(config))
        ledger = run.ledger(key, trainer.plan.describe())
        report = _train(trainer, run, ledger, config, console, not_private, passed)
    finally:
        run.destroy_key()
    console.print(summary(report, str(path)))
    return report


def prepare(config: DictConfig, key: bytes) -> tuple[Trainer, checks.Preflight]:
    """Returns a trainer with everything that a run needs, built and checked, and what was found.

    Args:
        config: A resolved configuration.
        key: The run's key.

    Raises:
        ValueError: If the configuration, the data or the model is unsound.
    """
    place = placement(config)
    seed_everything(config.seed)
    parts = build(config)
    data = parts["data"]
    if not isinstance(data, Dataset):
        raise ValueError(f"Expected data to be a dpsgd.data.Dataset, got {type(data).__name__}.")
    model = place.model(parts["model"])
    if config.model.init_from is not None:
        load_weights(model, config.model.init_from)
    plan = privacy_plan(config, parts["sampler"](key=rng.derive(key, "sampler")), parts["clipping"])
    loss_fn, batch = parts["loss"], checks.synthetic_batch(data, 4)
    if isinstance(plan.sampler, UserPoisson):
        loss_fn = PerUser(loss_fn)
        batch = checks.synthetic_users(data, 4, plan.sampler.records_per_user)
    engine = parts["engine"](model, loss_fn)
    passed = checks.preflight(engine, place.batch(batch))
    plan.clipping.groups(list(engine.parameters))
    optimizer = parts["optimizer"](list(engine.parameters.values()))
    noise = parts["noise"](key=rng.derive(key, "noise"))
    trainer = Trainer(
        plan.private_step(engine, optimizer, noise),
        data,
        plan,
        physical_batch_size=config.trainer.physical_batch_size,
        evaluate_every=config.trainer.evaluate_every,
    )
    return trainer, passed


def _train(
    trainer: Trainer,
    run: RunDirectory,
    ledger: Ledger,
    config: DictConfig,
    console: Console,
    not_private: list[str],
    passed: checks.Preflight,
) -> dict[str, Any]:
    """Runs the trainer to its end or to Ctrl-C; saves the model either way."""
    with console.status("accounting: epsilon of every step"):
        trainer.plan.spent(1)
    start = time.perf_counter()
    test: dict[str, float] = {}
    history: list[dict[str, float]] = []
    public, private = _loggers(run, config)
    interrupted = False
    with public[0], public[1], _progress(console) as progress:
        task = progress.add_task("training", total=trainer.plan.num_steps, status="")
        try:
            for report in trainer.run(ledger):
                test.update(report.test)
                if report.test:
                    row = {"step": report.step, "epsilon": report.epsilon, **report.test}
                    history.append(row)
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
    ledger.end(steps)
    final = final_report(
        trainer.plan,
        charged(run.path),
        trainer.step.engine,
        passed.routes,
        steps_taken=steps,
        history=history,
        seconds=seconds,
        interrupted=interrupted,
        not_private=not_private,
    )
    run.save_model(trainer.step.engine.model)
    write_report(run.path, final, redacted(config))
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


def train_best(config: DictConfig, path: Path, console: Console) -> dict[str, Any]:
    """Trains a random number of candidates and releases the best (`sweep=random_stopping`).

    Raises:
        ValueError: As `train` and `random_stopping.run_candidates` do.
    """
    if build(config, ("data",))["data"].test is None:
        raise ValueError(
            "Expected a public test set to choose the best run by, got data without one. Give one, "
            "or use sweep=grid."
        )

    def releases(candidate: DictConfig) -> Releases:
        parts = build(candidate, ("clipping", "sampler"))
        sampler = parts["sampler"](key=rng.fresh_key())  # draws nothing
        return privacy_plan(candidate, sampler, parts["clipping"]).releases()

    def one(candidate: DictConfig, folder: Path, key: bytes) -> dict[str, Any]:
        report = train(candidate, folder, Console(quiet=True), key)
        if report["interrupted"]:
            raise KeyboardInterrupt
        return report

    key = fixed_key(config) or rng.fresh_key()
    with console.status("training a random number of candidates, which stays secret"):
        report = run_candidates(config, path, releases, one, key)
    console.print(summary(report, str(path)))
    return report


def _kinds_of_sweep() -> dict[str, Callable[[DictConfig, Path, Console], dict[str, Any]]]:
    return {"grid": train, "random_stopping": train_best}


def main() -> None:
    """The command."""
    torch.set_float32_matmul_precision("highest")
    console = Console()

    def task(config: DictConfig) -> None:
        path = cli.run_path(config.run.dir)
        start = _kinds_of_sweep().get(config.sweep.kind)
        if start is None:
            raise ValueError(
                f"Expected sweep={' or '.join(_kinds_of_sweep())}, got '{config.sweep.kind}'."
            )
        report = start(config, path, console)
        if report["interrupted"]:
            raise KeyboardInterrupt

    cli.run(task, "train")


if __name__ == "__main__":
    main()
