"""`python -m dpsgd.bench`: what a private training step costs with each engine, on your model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from dpsgd.benchmark.sweep import save_curves, setting_and_values, with_setting
from dpsgd.benchmark.systems import BASELINE, Step, System, Workload, expand, failure, label
from dpsgd.benchmark.timing import Schedule, interleaved

RESULTS = "bench.json"
CHART = "bench.png"


@dataclass(frozen=True)
class Plan:
    """What is going to be measured, all settings checked.

    Attributes:
        workload: What all systems run.
        systems: The systems, ordinary training first.
        schedule: How often steps are taken.
        memory: Whether memory is measured, too.
    """

    workload: Workload
    systems: Sequence[System]
    schedule: Schedule
    memory: bool

    @classmethod
    def from_config(cls, config: DictConfig) -> Plan:
        """Checks the settings, without measuring anything.

        Args:
            config: A resolved configuration, Hydra being initialised (engines are found by name).

        Raises:
            ValueError: If the configuration is unsound.
        """
        settings = config.bench
        if settings.batch_size < 1:
            raise ValueError(f"Expected bench.batch_size >= 1, got {settings.batch_size}.")
        schedule = Schedule(settings.warmup, settings.repetitions, settings.max_seconds)
        systems = systems_of(config)
        workload = Workload.from_config(config)
        workload.check(systems)
        return cls(workload, systems, schedule, settings.memory)

    def measure(self, console: Console) -> Results:
        """Returns the measurements of all systems.

        Raises:
            ValueError: If ordinary training cannot run the workload.
        """
        with _progress(console) as progress:
            rows = [Measurement(system.name) for system in self.systems]
            if self.memory:
                rows = _memory(self.workload, self.systems, progress)
            rows = _times(self.workload, self.systems, rows, self.schedule, progress)
        if rows[0].refusal is not None:
            raise ValueError(f"Ordinary training cannot run this workload: {rows[0].refusal}")
        return Results(self.workload, rows)


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
    plan = Plan.from_config(config)
    _make(path)
    results = plan.measure(console)
    _write(results.as_dict(), path)
    save_chart(results, path / CHART)
    console.print(table(results))
    console.print(f"saved in {path}", highlight=False, soft_wrap=True)
    return results


def sweep(config: DictConfig, path: Path, console: Console) -> list[Results]:
    """Measures every system for each value of one setting, and draws how the cost grows.

    Args:
        config: As for `bench`; `bench.sweep` names the setting and its values.
        path: The directory for bench.json and bench.png.
        console: Where the progress and the tables go.

    Raises:
        ValueError: If the configuration is unsound with some value, or ordinary training cannot
            run it.
    """
    key, values = setting_and_values(config)
    configs = [with_setting(config, key, value) for value in values]
    for each in configs:
        Plan.from_config(each)
    _make(path)
    found = []
    for value, each in zip(values, configs):
        console.print(f"{key}={value}", style="bold", highlight=False)
        found.append(Plan.from_config(each).measure(console))
        console.print(table(found[-1]))
    curves = [results.as_dict() for results in found]
    _write({"sweep": key, "values": values, "results": curves}, path)
    save_curves(key, values, found, path / CHART)
    console.print(f"saved in {path}", highlight=False, soft_wrap=True)
    return found


def _write(report: dict[str, Any], path: Path) -> None:
    text = json.dumps(report, indent=2)
    (path / RESULTS).write_text(text + "\n", encoding="utf-8")


def systems_of(config: DictConfig) -> list[System]:
    """Returns the systems to measure, ordinary training first.

    Raises:
        ValueError: If `bench.engines` names no engine, an unknown one, or one of them twice.
    """
    settings: Any = OmegaConf.to_container(config.bench, resolve=True)
    systems = [System(BASELINE, None)]
    for name, options in expand(settings["engines"], settings["variants"]):
        model = options.pop("model", {})
        if name == BASELINE:
            systems.append(System(label(name, options), None, model, **_ordinary(options)))
        else:
            engine = {**_engine_section(name), **options}
            systems.append(System(label(name, options), engine, model))
    names = [system.name for system in systems]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Expected different systems in bench.engines, got {twice} repeated.")
    return systems


def _ordinary(options: dict[str, Any]) -> dict[str, bool]:
    """The options of ordinary training."""
    if set(options) != {"compile"} or not isinstance(options["compile"], bool):
        raise ValueError(
            f"Expected {{{BASELINE}: {{compile: true}}}} in bench.engines, got {options}: ordinary "
            "training as it is always comes first."
        )
    return {"compile": options["compile"]}


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
            faults = () if tick.page_faults is None else (tick.page_faults,)
            row = replace(
                row,
                seconds=(*row.seconds, tick.seconds),
                page_faults=(*row.page_faults, *faults),
            )
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
        command = sweep if config.bench.sweep else bench
        command(config, cli.run_path(config.bench.dir), console)

    cli.run(task, "bench")


if __name__ == "__main__":
    main()
