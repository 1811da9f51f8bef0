"""What a sweep spends: the composition of all its runs, whichever of them is used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from dpsgd import metrics
from dpsgd.accounting import epsilon_of, neighbouring
from dpsgd.ledger import Charged
from dpsgd.run_directory import CONFIG, LEDGER, REPORT, charged, read_report, write_report

SWEEP = "sweep.json"


class Composition(Callback):
    """Hydra's callback at the end of a multirun: prints and writes what the sweep spent."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Charges every run below the sweep's directory, those that failed included."""
        folder = Path(str(config.hydra.sweep.dir))
        runs = [file.parent for file in sorted(folder.glob(f"*/{LEDGER}"))]
        if len(runs) > 1:
            summarise(folder, runs, Console())


@dataclass(frozen=True)
class Spent:
    """What several runs spent together.

    Attributes:
        epsilon: Of all of them.
        delta: Of all of them.
        neighbours: What neighbouring data sets differ in.
        accounting: How it was computed.
    """

    epsilon: float
    delta: float
    neighbours: str
    accounting: str


def compose(ledgers: Sequence[Charged]) -> Spent:
    """Returns what runs on the same data spent together, their results all released.

    Runs of one adjacency and accountant are composed exactly; others by adding up epsilons and
    deltas, which is always valid.
    """
    kinds = {(c.plan["adjacency"], c.plan["accountant"], c.plan["unit"]) for c in ledgers}
    delta = max(c.plan["delta"] for c in ledgers)
    if len(kinds) == 1:
        adjacency, accountant, unit = kinds.pop()
        events: Counter[Any] = Counter()
        for ledger in ledgers:
            for event, count in ledger.releases():
                events[event] += count
        spent = epsilon_of(tuple(events.items()), delta, accountant, adjacency)
        return Spent(spent, delta, neighbouring(adjacency, unit), f"composition ({accountant})")
    adjacencies = {adjacency for adjacency, _, _ in kinds}
    if len(adjacencies) > 1:
        raise ValueError(
            "Expected runs of one adjacency to add up their epsilons, got both add_remove and "
            "replace_one: no single guarantee covers them."
        )
    epsilon, delta = sum(c.epsilon() for c in ledgers), sum(c.plan["delta"] for c in ledgers)
    neighbours = neighbouring(adjacencies.pop(), "record")
    return Spent(epsilon, delta, neighbours, "sum of the epsilons and deltas")


def summarise(folder: Path, runs: Sequence[Path], console: Console) -> None:
    """Prints a table of a sweep's runs, writes sweep.json, and adds the sweep to their reports."""
    ledgers = [charged(run) for run in runs]
    reports = [_report(run) for run in runs]
    try:
        spent = compose(ledgers)
    except ValueError as error:
        console.print(f"[bold red]The sweep has no epsilon of its own.[/] {error}")
        return
    best = best_of(reports)
    entry = {
        "epsilon": spent.epsilon,
        "delta": spent.delta,
        "runs": len(runs),
        "accounting": spent.accounting,
    }
    jobs = [
        {"run": run.name, "epsilon": ledger.epsilon(), "test": (report or {}).get("test", {})}
        for run, ledger, report in zip(runs, ledgers, reports)
    ]
    winner = None if best is None else runs[best].name
    text = json.dumps({**entry, "best": winner, "jobs": jobs}, indent=2)
    (folder / SWEEP).write_text(text + "\n", encoding="utf-8")
    for run, report in zip(runs, reports):
        if report is not None:
            config = (run / CONFIG).read_text(encoding="utf-8")
            write_report(run, {**report, "sweep": entry}, config)
    console.print(_table(jobs, best, spent))


def best_of(reports: Sequence[Mapping[str, Any] | None]) -> int | None:
    """Returns the index of the report with the best test result, None if there is none."""
    scores = {i: metrics.goodness(report["test"]) for i, report in enumerate(reports) if report}
    known = {i: score for i, score in scores.items() if score is not None}
    return max(known, key=lambda i: known[i]) if known else None


def _report(run: Path) -> dict[str, Any] | None:
    """The report of a run; None if it did not end."""
    return read_report(run) if (run / REPORT).is_file() else None


def _table(jobs: Sequence[Mapping[str, Any]], best: int | None, spent: Spent) -> Table:
    table = Table(
        title="dpsgd: sweep",
        title_justify="left",
        caption=(
            f"All {len(jobs)} runs together: epsilon {spent.epsilon:.3f}, delta {spent.delta:g} "
            f"({spent.neighbours}), by {spent.accounting}. This is the guarantee of whichever run "
            "is chosen for its result."
        ),
        caption_justify="left",
    )
    table.add_column("run", overflow="fold")
    table.add_column("epsilon alone", justify="right")
    table.add_column("test", justify="right")
    for number, job in enumerate(jobs):
        test = job["test"]
        measured = metrics.headline(test)
        result = "-" if measured is None else metrics.shown(measured, test[measured])
        style = "bold green" if number == best else None
        name = f"{job['run']} (best)" if number == best else job["run"]
        table.add_row(name, f"{job['epsilon']:.3f}", result, style=style)
    return table
