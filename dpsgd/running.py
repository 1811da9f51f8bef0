"""One run in its directory: steps, logs, checkpoints, and the report at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

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

from dpsgd import metrics, replay, resuming
from dpsgd.checkpoint import Checkpoint
from dpsgd.checks import Preflight
from dpsgd.config import saved_settings
from dpsgd.ledger import Ledger
from dpsgd.loggers import (
    JsonLines,
    Logger,
    TensorBoard,
    history,
    private_scalars,
    public_scalars,
    speed_scalar,
)
from dpsgd.report import caution, final_report
from dpsgd.resuming import Start
from dpsgd.run_directory import METRICS, RunDirectory, charged, write_report
from dpsgd.signals import Stop, stopping
from dpsgd.tensor_files import files_of, read
from dpsgd.trainer import StepReport, Trainer


def run_to_end(
    trainer: Trainer,
    run: RunDirectory,
    start: Start,
    config: DictConfig,
    console: Console,
    not_private: list[str],
    passed: Preflight,
) -> dict[str, Any]:
    """Runs the trainer to its end or until somebody asks to stop; saves the model either way.

    Of several processes the one that leads runs this, the others `dpsgd.following.follow`.
    """
    parallel = trainer.step.parallel
    with console.status("accounting: epsilon of every step"):
        budget = resuming.budget(trainer.plan, start)
        until, curve = parallel.world.broadcast(budget.last_step()), budget.curve()
    if start.checkpoint is not None:
        at = f"step {start.checkpoint.step} of {trainer.plan.num_steps}"
        if start.replays:
            console.print(f"Going on from {at}, exactly where it was.")
        if until < trainer.plan.num_steps:
            console.print(
                caution(f"Steps were paid for twice, so the budget ends at step {until}.")
            )
    trainer.spent = curve
    saved = saved_settings(config)
    first = 0 if start.checkpoint is None else start.checkpoint.step
    if start.checkpoint is None:
        run.clear()
        run.begin(start.key, start.record, saved)
        guarantee = replay.critical(replay.settings(config))
        ledger = run.new_ledger({**trainer.plan.describe(), "settings": guarantee})
    else:
        load(trainer, start)
        run.remove_results()
        run.begin(start.key, start.record, saved)
        ledger = run.ledger(start.attempt)
    with closing(ledger):
        seconds = _steps(trainer, run, start, ledger, until, config, console)
        steps = trainer.step.step
        final = final_report(
            trainer,
            charged(run.path),
            passed.routes,
            until=until,
            steps_timed=steps - first,
            history=history(run.path / METRICS),
            seconds=seconds,
            curve=curve,
            not_private=not_private,
        )
        model = trainer.step.engine.model
        with trainer.weights_to_publish():
            run.save_model(model, parallel.weights(model))
        write_report(run.path, final, saved)
        if not final["interrupted"]:
            ledger.end(steps)
            run.finish()
    return final


def _steps(
    trainer: Trainer,
    run: RunDirectory,
    start: Start,
    ledger: Ledger,
    until: int,
    config: DictConfig,
    console: Console,
) -> float:
    """Takes the steps, with logs and checkpoints, to the last one or until asked to stop.

    Returns:
        The seconds that they took.
    """
    began = time.perf_counter()
    first, every = trainer.step.step, config.checkpoint.every
    lines, public, private = _loggers(run, config, first)
    if start.checkpoint is not None and start.checkpoint.facts["metrics"] != lines.digest:
        console.print(caution("metrics.jsonl was changed: the report's history is not whole."))

    files = files_of(trainer.step.parallel)

    def save() -> None:
        for logger in (lines, *public, *private):
            logger.flush()
        run.checkpoints(files).save(_checkpoint(trainer, start.attempt, ledger, lines))

    with stopping() as stop, ExitStack() as stack:
        for logger in (lines, *public, *private):
            stack.enter_context(logger)
        progress = stack.enter_context(_progress(console))
        task = progress.add_task("training", total=until, completed=first, status="")
        test: dict[str, float] = {}
        if not start.replays:
            save()
        for report, due in steps_of(trainer, until, every, stop, ledger):
            test.update(report.test)
            for logger in (lines, *public):
                logger.log(report.step, public_scalars(report))
            for logger in private:
                logger.log(report.step, private_scalars(report))
            progress.update(task, completed=report.step, status=_status(report, test))
            if due:
                save()
        seconds = time.perf_counter() - began
        if first < trainer.step.step == until:
            plan, factors = trainer.plan, trainer.plan.sampler.factors
            steps = factors.total(until) - factors.total(first)
            speed = speed_scalar(steps * plan.expected_batch_size, seconds)
            for logger in (lines, *public):
                logger.log(until, speed)
    return seconds


def load(trainer: Trainer, start: Start) -> None:
    """Puts a trainer where a run goes on, if it does; all processes at once."""
    if start.checkpoint is not None:
        parallel = trainer.step.parallel
        state = read(start.checkpoint.state, parallel.mesh, alone=parallel.world.size == 1)
        trainer.step.load_state_dict(state, own_figures=not start.replays)


def steps_of(
    trainer: Trainer, until: int, every: int | None, stop: Stop, ledger: Ledger | None = None
) -> Iterator[tuple[StepReport, bool]]:
    """Takes steps until the last one, or until some process is asked to stop.

    Yields:
        The report of each step, and whether a checkpoint is due after it.
    """
    trainer.asked_to_stop = lambda: stop.asked
    for report in trainer.run(ledger, until):
        due = report.stopping or report.step == until
        yield report, due or bool(every and report.step % every == 0)
        if report.stopping:
            return


def _checkpoint(trainer: Trainer, attempt: int, ledger: Ledger, lines: JsonLines) -> Checkpoint:
    facts = {
        "physical_batch_size": trainer.physical_batch_size,
        "choices": dict(trainer.step.engine.choices.made),
        "ledger": ledger.head,
        "metrics": lines.digest,
    }
    return Checkpoint(attempt, trainer.step.step, trainer.step.state_dict(), facts)


def _loggers(
    run: RunDirectory, config: DictConfig, step: int
) -> tuple[JsonLines, list[Logger], list[Logger]]:
    """The metrics file, further public logs and private ones, all going on after a step."""
    lines = JsonLines(run.path / METRICS, step)
    public: list[Logger] = [TensorBoard(run.path / "tensorboard", step)]
    if not config.logger.diagnostics:
        return lines, public, []
    return (
        lines,
        public,
        [
            JsonLines(run.private / "diagnostics.jsonl", step),
            TensorBoard(run.private / "tensorboard", step),
        ],
    )


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
    name = metrics.headline(test)
    words = "" if name is None else name.removeprefix("test_")
    result = "" if name is None else f", {words} {metrics.shown(name, test[name])}"
    return f"epsilon <= {report.epsilon:.2f}{result}"
