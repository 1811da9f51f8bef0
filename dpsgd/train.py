"""`python -m dpsgd.train`: trains a model with differential privacy."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from dpsgd import cli, physical_batch, replay, resuming, rng
from dpsgd.accounting import Releases
from dpsgd.components import build
from dpsgd.config import fixed_key, placement
from dpsgd.engines.memory import is_out_of_memory
from dpsgd.planning import privacy_plan
from dpsgd.precision import UPDATES_LOST
from dpsgd.preparation import assembled, prepare
from dpsgd.random_stopping import run_candidates
from dpsgd.report import banner, caution, summary
from dpsgd.run_directory import CONFIG, KEY, REPORT, RunDirectory, read_report
from dpsgd.running import run_to_end
from dpsgd.saved_run import read_config

_KEY_FIXED = "privacy.key is fixed: whoever knows it can subtract the noise."


def train(
    config: DictConfig, path: Path, console: Console, key: bytes | None = None
) -> dict[str, Any]:
    """Trains as the configuration says and returns the final report.

    Everything is checked before the run directory is made and before a record is used. In the
    directory of an unfinished run, that run goes on.

    Args:
        config: A resolved configuration.
        path: The run's directory.
        console: Where the progress and the summary go.
        key: The key of a new run; by default the configuration's, or a fresh one.

    Raises:
        ValueError: If the configuration, the data or the model is unsound, the run cannot go on, or
            its files cannot be written.
    """
    run = RunDirectory(path)
    fixed_key(config)
    if run.unfinished:
        with run.held():
            if run.ended:  # it was killed between its last line and this
                run.finish()
                console.print(f"The run in '{run.path}' had ended; its key is destroyed now.")
                return read_report(run.path)
            return _in_directory(config, run, console, key)
    return _in_directory(config, run, console, key)


def _in_directory(
    config: DictConfig, run: RunDirectory, console: Console, key: bytes | None
) -> dict[str, Any]:
    place, parts = placement(config), assembled(config)
    start = resuming.started(run, config, parts["data"], place.device, key)
    trainer, passed = prepare(config, parts, start.streams)
    if start.charged is not None:
        resuming.check_plan(trainer.plan, start.charged)
    if start.replays and start.checkpoint is not None:
        trainer.physical_batch_size = start.checkpoint.facts["physical_batch_size"]
        trainer.step.engine.choices.made.update(start.checkpoint.facts["choices"])
        trainer.step.engine.choices.final = True
    else:
        for note in physical_batch.settle(trainer, config.trainer.physical_batch_size):
            console.print(note)
    not_private = [_KEY_FIXED] if start.record["fixed"] else []
    if not_private:
        console.print(banner(not_private))
    if place.dtype == torch.bfloat16:
        console.print(caution(UPDATES_LOST))
    if trainer.plan.sampler.caution is not None:
        console.print(caution(trainer.plan.sampler.caution))
    for note in start.notes:
        console.print(caution(note))
    with nullcontext() if run.unfinished else run.held():
        try:
            report = run_to_end(trainer, run, start, config, console, not_private, passed)
        except OSError as error:
            raise ValueError(
                f"Cannot write '{error.filename or run.path}': {error.strerror or error}. Mend "
                f"that, then go on with: {_command(run.path)}"
            ) from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"Out of memory at step {trainer.step.step}: {str(error).splitlines()[0]} Free "
                f"some, then go on with: {_command(run.path)} (with a lower "
                "trainer.physical_batch_size it is a new attempt)"
            ) from error
        except KeyboardInterrupt:
            if (run.private / KEY).exists():
                console.print(f"Go on with: {_command(run.path)}", soft_wrap=True)
            raise
    console.print(summary(report, str(run.path)))
    return report


def _command(path: Path) -> str:
    return f"python -m dpsgd.train resume={shlex.quote(str(path))}"


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


def _ended(config: DictConfig, path: Path) -> dict[str, Any] | None:
    """The report of a job that ended when its sweep ran before, None if there is none."""
    if not (path / REPORT).exists() or (path / "private" / KEY).exists():
        return None
    same = replay.settings(read_config(path / CONFIG)) == replay.settings(config)
    return read_report(path) if same else None


def main() -> None:
    """The command."""
    torch.set_float32_matmul_precision("highest")
    console = Console()

    def task(config: DictConfig) -> None:
        if config.resume is not None:
            config = cli.resumed(config)
        path = cli.run_path(config.run.dir)
        start = _kinds_of_sweep().get(config.sweep.kind)
        if start is None:
            raise ValueError(
                f"Expected sweep={' or '.join(_kinds_of_sweep())}, got '{config.sweep.kind}'."
            )
        report = _ended(config, path) if cli.in_sweep() else None
        if report is None:
            report = start(config, path, console)
        else:
            console.print(f"The run in '{path}' had ended; it is not repeated.")
        if report["interrupted"]:
            again = _command(path)
            if cli.in_sweep():
                again = f"the same command and run.dir={shlex.quote(str(path.parent))}"
            console.print(f"Go on with: {again}", soft_wrap=True, highlight=False)
            raise KeyboardInterrupt

    cli.run(task, "train")


if __name__ == "__main__":
    main()
