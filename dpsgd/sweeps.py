"""What a sweep spends: the composition of all its runs, whichever of them is used."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from dpsgd import durable, jobs, metrics
from dpsgd.accounting import epsilon_of, neighbouring
from dpsgd.jobs import Outcome
from dpsgd.ledger import Charged
from dpsgd.run_directory import CONFIG, LEDGER, PAGE, REPORT, charged, read_report, write_report

SWEEP = "sweep.json"


class Composition(Callback):
    """Hydra's callback around a multirun: prints and writes what the sweep did and spent."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Prepares for the jobs."""
        jobs.begin(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Charges every run below the sweep's directory, those that failed included.

        Raises:
            SystemExit: If a job failed.
            KeyboardInterrupt: If a job was interrupted.
        """
        folder = Path(str(config.hydra.sweep.dir))
        outcomes, console = jobs.collect(folder), Console()
        runs = [file.parent for file in folder.glob(f"*/{LEDGER}")]
        runs.sort(key=lambda run: _in_order(run.name))
        wrong = ""
        try:
            if len(runs) > 1 or len(outcomes) > 1:
                summarise(folder, runs, console, outcomes)
        except (ValueError, OSError) as error:
            wrong = f"Error: the sweep cannot be summed up: {error}"
        try:
            status = jobs.exit_status(outcomes)
        except KeyboardInterrupt:
            again = f"the same command and run.dir={shlex.quote(str(folder))}"
            console.print(f"Go on with: {again}", soft_wrap=True, highlight=False)
            raise
        if wrong:
            print(wrong, file=sys.stderr)
        if wrong or status:
            sys.exit(status or jobs.EXIT_BAD_INPUT)


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


def summarise(
    folder: Path, runs: Sequence[Path], console: Console, outcomes: Sequence[Outcome] = ()
) -> None:
    """Prints a table of a sweep's jobs, writes sweep.json, and adds the sweep to their reports.

    Args:
        folder: Of the sweep.
        runs: The runs in it that charged something: all of them count.
        console: Where the table goes.
        outcomes: How the jobs of the command ended, those that charged nothing included.

    Raises:
        ValueError: If a run's ledger or report is damaged.
    """
    ledgers = [charged(run) for run in runs]
    reports = [_report(run) for run in runs]
    best = best_of(reports)
    rows = _rows(runs, ledgers, reports, outcomes)
    winner = None if best is None else runs[best].name
    try:
        spent = compose(ledgers) if ledgers else None
    except ValueError as error:
        console.print(_table(rows, winner, f"The sweep has no epsilon of its own. {error}"))
        return
    if spent is None:
        console.print(_table(rows, winner, "No job came to its first step: nothing was spent."))
        return
    entry = {
        "epsilon": spent.epsilon,
        "delta": spent.delta,
        "runs": len(runs),
        "accounting": spent.accounting,
    }
    text = json.dumps({**entry, "best": winner, "jobs": rows}, indent=2)
    durable.write(folder / SWEEP, (text + "\n").encode())
    for run, report in zip(runs, reports):
        if report is not None:
            config = (run / CONFIG).read_text(encoding="utf-8")
            write_report(run, {**report, "sweep": entry}, config)
    caption = _guarantee(len(runs), spent)
    if not all(report["private"] for report in reports if report is not None):
        caption = f"[bold red]NOT PRIVATE[/], not all of it. {caption}"
    console.print(_table(rows, winner, caption))
    pages = f"{folder}/*/{PAGE}, and " if any(r is not None for r in reports) else ""
    console.print(f"Reports: {pages}{folder / SWEEP}", soft_wrap=True)


def _in_order(run: str) -> tuple[int, str]:
    """By the number that the name of a job's directory begins with."""
    number = run.partition("_")[0]
    return (int(number) if number.isdigit() else 0, run)


def _rows(
    runs: Sequence[Path],
    ledgers: Sequence[Charged],
    reports: Sequence[Mapping[str, Any] | None],
    outcomes: Sequence[Outcome],
) -> list[dict[str, Any]]:
    """One entry per job: those of this command, and what earlier ones left in the directory."""
    known = {outcome.run: outcome for outcome in outcomes}
    rows = []
    for run, ledger, report in zip(runs, ledgers, reports):
        outcome = known.pop(run.name, None)
        rows.append(
            {
                "run": run.name,
                "settings": run.name if outcome is None else outcome.settings,
                "status": _status(report) if outcome is None else outcome.status,
                "epsilon": ledger.epsilon(),
                "test": (report or {}).get("test", {}),
            }
        )
    for outcome in known.values():  # they charged nothing
        row = {"run": outcome.run, "settings": outcome.settings, "status": outcome.status}
        rows.append({**row, "epsilon": None, "test": {}})
    return sorted(rows, key=lambda row: _in_order(row["run"]))


def _status(report: Mapping[str, Any] | None) -> str:
    return jobs.INTERRUPTED if report is None or report["interrupted"] else jobs.ENDED


def best_of(reports: Sequence[Mapping[str, Any] | None]) -> int | None:
    """Returns the index of the report with the best test result, None if there is none."""
    scores = {i: metrics.goodness(report["test"]) for i, report in enumerate(reports) if report}
    known = {i: score for i, score in scores.items() if score is not None}
    return max(known, key=lambda i: known[i]) if known else None


def _report(run: Path) -> dict[str, Any] | None:
    """The report of a run; None if it did not end."""
    return read_report(run) if (run / REPORT).is_file() else None


def _guarantee(runs: int, spent: Spent) -> str:
    together = "The one run" if runs == 1 else f"All {runs} runs together"
    return (
        f"{together}: epsilon {spent.epsilon:.3f}, delta {spent.delta:g} "
        f"({spent.neighbours}), by {spent.accounting}. This is the guarantee of whichever run "
        "is chosen for its result; the epsilon of that run alone is not."
    )


def _table(rows: Sequence[Mapping[str, Any]], best: str | None, caption: str) -> Table:
    table = Table(
        title="dpsgd: sweep", title_justify="left", caption=caption, caption_justify="left"
    )
    table.add_column("job", justify="right")
    table.add_column("settings", overflow="fold")
    table.add_column("test", justify="right")
    table.add_column("epsilon alone", justify="right")
    table.add_column("")
    for row in rows:
        test = row["test"]
        measured = metrics.headline(test)
        result = "-" if measured is None else metrics.shown(measured, test[measured])
        epsilon = "-" if row["epsilon"] is None else f"{row['epsilon']:.3f}"
        won = row["run"] == best
        remarks = ["best"] * won + [row["status"]] * (row["status"] != jobs.ENDED)
        number = row["run"].partition("_")[0]
        style = "bold green" if won else None
        table.add_row(number, row["settings"], result, epsilon, ", ".join(remarks), style=style)
    return table
