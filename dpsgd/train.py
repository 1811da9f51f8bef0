"""`python -m dpsgd.train`: trains a model with differential privacy."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from dpsgd import cli, replay, resuming, rng
from dpsgd.accounting import Releases
from dpsgd.components import build
from dpsgd.config import fixed_key, placement
from dpsgd.engines.memory import is_out_of_memory
from dpsgd.following import follow
from dpsgd.lost_peers import LostPeer
from dpsgd.parallel import World, joined
from dpsgd.parallel.world import NobodyThere, this_job
from dpsgd.planning import privacy_plan
from dpsgd.precision import UPDATES_LOST
from dpsgd.preparation import assembled, make_ready, prepare
from dpsgd.random_stopping import run_candidates
from dpsgd.report import banner, caution, summary
from dpsgd.run_directory import CONFIG, KEY, REPORT, RunDirectory, read_report
from dpsgd.running import run_to_end
from dpsgd.saved_run import read_config

_ONE_RUN = (
    "Expected a single run in a job of {} processes, got a sweep. Run sweeps without torchrun, or "
    "each of its runs as a job of its own."
)
_KEY_FIXED = "privacy.key is fixed: whoever knows it can subtract the noise."


def train(
    config: DictConfig, path: Path, console: Console, key: bytes | None = None
) -> dict[str, Any]:
    """Trains as the configuration says and returns the final report.

    Of several processes the one that leads does; the others return whether they were interrupted.

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
    fixed_key(config)
    world = this_job()
    if not world.leads:
        return {"interrupted": follow(config, world)}
    run = RunDirectory(path)
    if run.unfinished:
        with run.held():
            if run.ended:  # it was killed between its last line and this
                world.broadcast(False)
                run.finish()
                console.print(f"The run in '{run.path}' had ended; its key is destroyed now.")
                return read_report(run.path)
            return _in_directory(config, run, console, key)
    return _in_directory(config, run, console, key)


def _in_directory(
    config: DictConfig, run: RunDirectory, console: Console, key: bytes | None
) -> dict[str, Any]:
    world = this_job()
    world.broadcast(True)
    place, parts = placement(config), assembled(config)
    replay.agree(config, world)
    start = resuming.started(run, config, parts["data"], place.device, key, world.size)
    world.broadcast(start)
    resuming.check_records(parts["data"], start, world)
    trainer, passed = prepare(config, parts, start.streams)
    if start.charged is not None:
        resuming.check_plan(trainer.plan, start.charged)
    for note in make_ready(trainer, start, config.trainer.physical_batch_size):
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
        except LostPeer as error:
            raise ValueError(f"{error} Go on with: {_command(run.path)}") from error
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
    size = this_job().size
    start = "python" if size == 1 else f"torchrun --nproc-per-node={size}"
    return f"{start} -m dpsgd.train resume={shlex.quote(str(path))}"


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


def _run(config: DictConfig, console: Console) -> dict[str, Any]:
    """Does what the configuration says, and returns the report."""
    torch.set_float32_matmul_precision("highest")
    world = this_job()
    _check_kind(config, world)
    if config.resume is not None:
        config = world.broadcast(cli.resumed(config) if world.leads else config)
    path = cli.run_path(config.run.dir)
    report = _ended(config, path) if cli.in_sweep() else None
    if report is not None:
        console.print(f"The run in '{path}' had ended; it is not repeated.")
        return report
    report = _kinds_of_sweep()[config.sweep.kind](config, path, console)
    if report["interrupted"] and not cli.in_sweep():
        console.print(f"Go on with: {_command(path)}", soft_wrap=True, highlight=False)
    return report


def _check_kind(config: DictConfig, world: World) -> None:
    """Raises for a sweep of an unknown kind, or one that cannot be run in this way."""
    kinds, kind = _kinds_of_sweep(), config.sweep.kind
    if kind not in kinds:
        raise ValueError(f"Expected sweep={' or '.join(kinds)}, got '{kind}'.")
    if cli.in_sweep() and kind == "random_stopping":
        raise ValueError(  # the ledger of such a job is that of its winner alone
            "Expected sweep=random_stopping without -m, whose composition would not cover the runs "
            "that are kept secret: put all values into sweep.over."
        )
    if world.size > 1 and kind != "grid":
        raise ValueError(_ONE_RUN.format(world.size))


def main() -> None:
    """The command."""
    try:
        with joined() as world:
            if world.size > 1 and {"-m", "--multirun"} & set(sys.argv):
                cli.fail_with(_ONE_RUN.format(world.size), world.first_to_fail)

            def task(config: DictConfig) -> None:
                if _run(config, Console(quiet=not world.leads))["interrupted"]:
                    raise KeyboardInterrupt

            cli.run(task, "train", job=_run, speaks=world.first_to_fail)
    except NobodyThere as error:
        cli.fail_with(str(error))


if __name__ == "__main__":
    main()
