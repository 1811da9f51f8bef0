"""`python -m dpsgd.audit`: tries to break the privacy of a configuration, on made-up records."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dpsgd import cli, rng
from dpsgd.auditing import (
    Check,
    OneRun,
    Subject,
    TwoWorlds,
    audit_one_run,
    audit_two_worlds,
    check_runs,
    self_checks,
)
from dpsgd.auditing.chart import save_chart
from dpsgd.components import build
from dpsgd.preparation import assembled, prepare

RESULTS = "audit.json"
CHART = "tradeoff.png"
EXIT_VIOLATED = 1


@dataclass(frozen=True)
class Audit:
    """What was tried on a configuration.

    Attributes:
        checks: T1, T2 and T3.
        two_worlds: T5.
        one_run: T6, None where the canaries' gradients do not fit in memory.
    """

    checks: list[Check]
    two_worlds: TwoWorlds
    one_run: OneRun | None

    @property
    def violated(self) -> list[str]:
        """What contradicts the claim; the one-run audit never does, it is too weak a test."""
        found = [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]
        if self.two_worlds.violated:
            found.append(
                f"T5 two worlds: {len(self.two_worlds.violated)} measured points lie below the "
                f"claimed trade-off curve (epsilon at least {self.two_worlds.epsilon_gaussian:.2f} "
                f"measured, {self.two_worlds.claimed:.2f} claimed)"
            )
        return found


def audit(config: DictConfig, console: Console) -> Audit:
    """Audits a configuration, prints and writes what was found, and returns it.

    No private record is used, and no privacy spent.

    Args:
        config: A resolved configuration with the section `audit`.
        console: Where progress and results go.

    Raises:
        ValueError: If the configuration is unsound, or the settings make no sense.
    """
    settings = config.audit
    if not 0 < settings.confidence < 1:
        raise ValueError(f"Expected 0 < audit.confidence < 1, got {settings.confidence}.")
    if not settings.minutes > 0:
        raise ValueError(f"Expected audit.minutes > 0, got {settings.minutes}.")
    check_runs(settings.runs, settings.steps)
    folder = _made(cli.run_path(settings.dir))
    trainer, _ = prepare(config, assembled(config), rng.fresh_key())
    noise = build(config, ("noise",))["noise"]
    subject = Subject(trainer, lambda key: noise(key=key))
    with _progress(console) as progress:
        task = progress.add_task("T1, T2, T3", total=3)
        checks = []
        for check in self_checks(subject):
            checks.append(check)
            progress.advance(task)
        pairs = progress.add_task("T5 runs in each of two worlds", total=settings.runs)
        two_worlds = audit_two_worlds(
            subject,
            runs=settings.runs,
            steps=settings.steps,
            confidence=settings.confidence,
            seconds=60 * settings.minutes,
            progress=lambda done: progress.update(pairs, completed=done),
        )
        one = progress.add_task("T6 one run", total=1)
        one_run = audit_one_run(
            subject,
            canaries=settings.canaries,
            steps=settings.steps,
            confidence=settings.confidence,
        )
        progress.advance(one)
    found = Audit(checks, two_worlds, one_run)
    _write(found, subject, folder)
    console.print(_table(found, subject, settings, folder))
    if found.violated:
        console.print(Panel("\n".join(found.violated), title="PRIVACY VIOLATED", style="bold red"))
    return found


def _made(folder: Path) -> Path:
    """The directory, made before the minutes are spent."""
    folder = folder.expanduser()
    if (folder / RESULTS).exists():
        raise ValueError(
            f"Expected a new directory, but '{folder}' holds an audit. Choose another audit.dir."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"Expected audit.dir to be a directory that can be written, got '{folder}': "
            f"{error.strerror}."
        ) from error
    return folder


def _write(found: Audit, subject: Subject, folder: Path) -> None:
    plan = subject.plan
    report = {"violated": found.violated, "plan": plan.describe(), **asdict(found)}
    text = json.dumps(report, indent=2, default=bool)
    (folder / RESULTS).write_text(text + "\n", encoding="utf-8")
    claimed = plan.tradeoff(found.two_worlds.steps)
    save_chart(found.two_worlds, claimed, folder / CHART)


def _table(found: Audit, subject: Subject, settings: DictConfig, folder: Path) -> Table:
    worlds, one, plan = found.two_worlds, found.one_run, subject.plan
    table = Table(title="dpsgd: audit", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for check in found.checks:
        table.add_row(
            check.name,
            f"{'holds' if check.passed else 'VIOLATED'}: {check.detail}",
            style=None if check.passed else "bold red",
        )
    table.add_row(
        "T5 two worlds",
        f"epsilon {worlds.claimed:.3f} claimed for {worlds.steps} of {plan.num_steps} steps at "
        f"delta {worlds.delta:g}; measured at least {worlds.epsilon_gaussian:.3f} (if Gaussian, mu "
        f"{worlds.mu:.3f}) and {worlds.epsilon:.3f} (without assumption), "
        f"{_runs(worlds)} runs per world, confidence {settings.confidence:g}"
        + _weakness(worlds.strength / plan.movement),
        style="bold red" if worlds.violated else None,
    )
    if one is None:
        words = "not run: the gradients of ten canaries do not fit in memory"
    else:
        words = (
            f"epsilon {one.claimed:.3f} claimed, measured at least {one.epsilon:.3f} with "
            f"{one.canaries} canaries in one run (a report: this test is weak)"
        )
    table.add_row("T6 one run", words)
    table.add_row("saved in", str(folder))
    return table


def _runs(worlds: TwoWorlds) -> str:
    if worlds.runs == worlds.asked:
        return str(worlds.runs)
    return f"{worlds.runs} (time was up before {worlds.asked})"


def _weakness(share: float) -> str:
    if share > 0.9:
        return ""
    return f". The canary moves a sum by {share:.2f} of what is allowed for: the test is weaker"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def main() -> None:
    """The command."""
    console = Console()

    def task(config: DictConfig) -> None:
        if audit(config, console).violated:
            sys.exit(EXIT_VIOLATED)

    cli.run(task, "audit")


if __name__ == "__main__":
    main()
