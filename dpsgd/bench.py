"""`python -m dpsgd.bench`: what a private training step costs with each engine, on your model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dpsgd import cli
from dpsgd.benchmark.chart import save_chart
from dpsgd.benchmark.measurement import Measurement
from dpsgd.benchmark.memory import in_fresh_process
from dpsgd.benchmark.results import Results, table
from dpsgd.benchmark.systems import BASELINE, Step, System, Workload, expand, failure, label
from dpsgd.benchmark.timing import Schedule, interleaved

RESULTS = "bench.json"
CHART = "bench.png"


def bench(config: DictConfig, path: Path, console: Console) -> Results:
    """Measures every system of the configuration; writes the results and shows them.

    Time and memory are of one whole step: zero grad, forward, backward, clipping, noise and the
    optimizer's update, on one made-up batch of the declared shapes. No record is used.

    Args:
        config: A resolved configuration, Hydra being initialised (engines are looked up by name).
        path: The directory for bench.json and bench.png.
        console: Where the progress and the table go.

    Raises:
        ValueError: If the configuration is unsound, or ordinary training cannot run it.
    """
    settings = config.bench
    if settings.batch_size < 1:
        raise ValueError(f"Expected bench.batch_size >= 1, got {settings.batch_size}.")
    schedule = Schedule(settings.warmup, settings.repetitions, settings.max_seconds)
    systems = systems_of(config)
    workload = Workload.from_config(config)
    workload.check(systems)
    _make(path)
    with _progress(console) as progress:
        rows = _memory(workload, systems, progress) if settings.memory else _unmeasured(systems)
        rows = _times(workload, systems, rows, schedule, progress)
    if rows[0].refusal is not None:
        raise ValueError(f"Ordinary training cannot run this workload: {rows[0].refusal}")
    results = Results(workload, rows)
    text = json.dumps(results.as_dict(), indent=2)
    (path / RESULTS).write_text(text + "\n", encoding="utf-8")
    save_chart(results, path / CHART)
    console.print(table(results))
    console.print(f"saved in {path}", highlight=False, soft_wrap=True)
    return results


def systems_of(config: DictConfig) -> list[System]:
    """Returns the systems to measure, ordinary training first.

    Raises:
        ValueError: If `bench.engines` names no engine, an unknown one, or one of them twice.
    """
    settings: Any = OmegaConf.to_container(config.bench, resolve=True)
    systems = [System(BASELINE, None)]
    for name, options in expand(settings["engines"], settings["variants"]):
        systems.append(System(label(name, options), {**_engine_section(name), **options}))
    names = [system.name for system in systems]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Expected different systems in bench.engines, got {twice} repeated.")
    return systems


def _engine_section(name: str) -> dict[str, Any]:
    known = GlobalHydra.instance().config_loader().get_group_options("engine")
    if name not in known:
        raise ValueError(
            f"Expected bench.engines to name engines among {', '.join(known)}, got '{name}'."
        )
    section: Any = OmegaConf.to_container(compose(f"engine/{name}").engine, resolve=True)
    return section


def _make(path: Path) -> None:
    if (path / RESULTS).exists():
        raise ValueError(
            f"Expected a new directory, but '{path}' holds results. Choose another bench.dir."
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"Expected a directory that can be written, got '{path}': {error.strerror}."
        ) from error


def _unmeasured(systems: Sequence[System]) -> list[Measurement]:
    return [Measurement(system.name) for system in systems]


def _memory(workload: Workload, systems: Sequence[System], progress: Progress) -> list[Measurement]:
    """Peak memory first: what runs out of memory does so in a process that can be spared."""
    task = progress.add_task("memory", total=len(systems), status="")
    rows = []
    for system in systems:
        progress.update(task, status=system.name, refresh=True)
        rows.append(in_fresh_process(workload.config, system))
        progress.update(task, advance=1, refresh=True)
    progress.update(task, status="", refresh=True)
    return rows


def _times(
    workload: Workload,
    systems: Sequence[System],
    rows: Sequence[Measurement],
    schedule: Schedule,
    progress: Progress,
) -> list[Measurement]:
    """The rows with times; systems that refused already are left alone."""
    found = {row.name: row for row in rows}
    steps: dict[str, Step] = {}
    for system in systems:
        if found[system.name].refusal is None:
            try:
                steps[system.name] = workload.step(system)
            except (ValueError, RuntimeError) as error:
                refusal = failure(error)
                if refusal is None:
                    raise
                found[system.name] = replace(found[system.name], refusal=refusal)
    rounds = schedule.warmup + schedule.repetitions
    task = progress.add_task("time", total=rounds * len(steps), status="")
    for tick in interleaved(steps, schedule, workload.place.device):
        row = found[tick.name]
        if tick.counts:
            row = replace(row, seconds=(*row.seconds, tick.seconds))
        found[tick.name] = replace(row, refusal=tick.refusal)
        progress.update(task, advance=1, status=tick.name, refresh=True)
    progress.update(task, completed=rounds * len(steps), status="", refresh=True)
    return [_noted(found[system.name], schedule) for system in systems]


def _noted(row: Measurement, schedule: Schedule) -> Measurement:
    """The row, saying so if it had to do with fewer repetitions."""
    if row.refusal is not None:
        return replace(row, seconds=())
    if len(row.seconds) == schedule.repetitions:
        return row
    return replace(
        row,
        note=f"{len(row.seconds)} of {schedule.repetitions} repetitions: all of them would take "
        f"longer than bench.max_seconds={schedule.max_seconds:g}",
    )


def _progress(console: Console) -> Progress:
    """A progress bar drawn between the steps only: one that drew itself would disturb the clock."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
    )


def main() -> None:
    """The command."""
    console = Console()

    def task(config: DictConfig) -> None:
        bench(config, cli.run_path(config.bench.dir), console)

    cli.run(task, "bench")


if __name__ == "__main__":
    main()
