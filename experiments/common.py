"""What the studies share: runs of `dpsgd.train` on two cores, of which none is done twice."""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from dpsgd import rng
from dpsgd.accounting import calibrate_noise_multiplier
from dpsgd.config import config_dir, resolve
from dpsgd.preparation import assembled, prepare

ROOT = Path(__file__).resolve().parent.parent
DELTA = 1e-5
COLUMNS = "settings", "test_accuracy", "epsilon", "noise_multiplier", "seconds"
FAST = ("device=cpu", "trainer.physical_batch_size=1440", "trainer.evaluate_every=1000000")

Job = tuple[str, ...]
"""Settings of a run, as on the command line of `dpsgd.train`."""
Row = dict[str, Any]


def settings(overrides: Sequence[str], entry: str = "train") -> DictConfig:
    """Returns the configuration of an entry point with overrides."""
    typed = list(overrides)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return resolve(compose(entry, overrides=typed), typed)


def run(job: Job) -> Row:
    """Returns what a run came to: the steps of `dpsgd.train` without its files and reports."""
    config, began = settings([*FAST, *job]), time.perf_counter()
    trainer, _ = prepare(config, assembled(config), rng.fresh_key())
    *_, last = trainer.run()
    return {
        "test_accuracy": last.test["test_accuracy"],
        "epsilon": trainer.plan.epsilon(),
        "noise_multiplier": trainer.plan.noise_multiplier,
        "seconds": round(time.perf_counter() - began, 2),
    }


def finish(jobs: Iterable[Job], file: Path, title: str) -> dict[Job, Row]:
    """Returns the rows of jobs; those that are not in the CSV file yet are run and added to it."""
    jobs = list(dict.fromkeys(jobs))
    found = finished(file)
    missing = [job for job in jobs if job not in found]
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with Progress(*columns) as progress, ProcessPoolExecutor(2, context, _alone) as pool:
        task = progress.add_task(title, total=len(missing))
        waiting = {pool.submit(run, job): job for job in missing}
        for done in as_completed(waiting):
            found[waiting[done]] = done.result()
            _add(file, waiting[done], done.result())
            progress.advance(task)
    return {job: found[job] for job in jobs}


def finished(file: Path) -> dict[Job, Row]:
    """Returns the rows that a CSV file has."""
    if not file.exists():
        return {}
    with file.open(encoding="utf-8", newline="") as lines:
        return {
            tuple(row.pop("settings").split()): {name: float(row[name]) for name in row}
            for row in csv.DictReader(lines)
        }


def _add(file: Path, job: Job, row: Row) -> None:
    new = not file.exists()
    with file.open("a", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({"settings": " ".join(job), **row})


def _alone() -> None:
    """Prepares a process of the pool: one thread, and paths that start at the repository."""
    torch.set_num_threads(1)
    os.chdir(ROOT)


def start(files: Iterable[Path], description: str) -> None:
    """Reads the command line: `--again` forgets what was done before and stands in these files."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--again", action="store_true", help="run again what has been run")
    if parser.parse_args().again:
        for file in files:
            file.unlink(missing_ok=True)
    os.chdir(ROOT)


@cache
def noise_multiplier(epsilon: float) -> float:
    """Returns the noise multiplier of 60 steps on all records at an epsilon."""
    return calibrate_noise_multiplier(
        target_epsilon=epsilon, sample_rate=1.0, num_steps=60, delta=DELTA
    )


def at(epsilon: float, rate: float, seed: int) -> Job:
    """Returns settings: a budget, a learning rate of `rate` / noise multiplier, and a seed."""
    budget = f"privacy.target_epsilon={epsilon:g}"
    return budget, f"optimizer.lr={rate / noise_multiplier(epsilon):.4g}", f"seed={seed}"


def summarised(rows: Iterable[Row]) -> dict[str, float]:
    """Returns mean and standard deviation of the accuracies, and the largest epsilon spent."""
    rows = list(rows)
    found = [row["test_accuracy"] for row in rows]
    return {
        "mean": round(statistics.mean(found), 5),
        "standard_deviation": round(statistics.stdev(found), 5) if len(found) > 1 else 0.0,
        "runs": len(found),
        "epsilon_spent": max(row["epsilon"] for row in rows),
    }


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure that can be saved."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
