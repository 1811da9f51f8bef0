"""`python -m dpsgd.account`: what a configuration spends, or what a run has spent."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from dpsgd import accounting, cli, rng
from dpsgd.account_chart import save_chart, written
from dpsgd.account_compute import compare_batches
from dpsgd.components import build
from dpsgd.ledger import Charged, read
from dpsgd.plan import PrivacyPlan
from dpsgd.planning import privacy_plan
from dpsgd.report import attempts_in_words, between, caution
from dpsgd.run_directory import KEY, REPORT, charged
from dpsgd.settings import Plan

_RATES = (0.001, 0.01, 0.1)
_TOLERANCE = 1e-9
EXIT_MISMATCH = 1


def account(config: DictConfig, console: Console, typed: Sequence[str] = ()) -> PrivacyPlan:
    """Prints and returns the plan of a configuration; draws it if a file is named.

    Args:
        config: A resolved configuration.
        console: Where the table goes.
        typed: What the user typed, for commands that are suggested.

    Raises:
        ValueError: If the plan is unsound, or the picture cannot be written.
    """
    parts = build(config, ("clipping", "sampler"))
    if config.plan.kind == "compute":
        return compare_batches(config, parts["sampler"], parts["clipping"], console, typed)
    if config.plan != Plan():
        raise ValueError(f"Expected plan=compute or no setting of plan, got plan={config.plan}.")
    sampler = parts["sampler"](key=rng.fresh_key())  # draws nothing
    plan = privacy_plan(config, sampler, parts["clipping"], config.account.solve)
    console.print(_table(plan))
    if plan.sampler.caution is not None:
        console.print(caution(plan.sampler.caution))
    if config.account.plot is not None:
        path = Path(config.account.plot)
        with written(path):
            save_chart(plan, path)
        console.print(f"drawn in {path}")
    return plan


def verify(path: Path, console: Console) -> bool:
    """Prints what a ledger says and returns whether the run's own report agrees with it.

    Epsilon is derived anew from the ledger's lines, not from anything that the run computed.

    Args:
        path: A run's directory, or a ledger file (whose chain cannot be verified then).
        console: Where the table goes.

    Raises:
        ValueError: If the ledger is missing, damaged or was edited.
    """
    found = charged(path) if path.is_dir() else read(path)
    spent = found.epsilon()
    reported = _reported(path)
    agrees = reported is None or _agree(reported, spent, found)
    console.print(_ledger_table(found, spent, reported, agrees, path))
    return agrees


def _table(plan: PrivacyPlan) -> Table:
    sampler, clipping = plan.sampler, plan.clipping
    table = Table(title="dpsgd: privacy plan", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row(
        "guarantee",
        f"epsilon {plan.epsilon():.4f}, delta {plan.target_delta:g} "
        f"({accounting.neighbouring(plan.adjacency, sampler.unit)}, {plan.accountant.upper()})",
    )
    for adjacency, name in sampler.theorems:
        if adjacency == plan.adjacency and name != plan.accountant:
            table.add_row("cross-check", f"{name.upper()}: {plan.epsilon(accountant=name):.4f}")
    table.add_row("Gaussian DP", f"mu {plan.mu():.4f}, down to error rates of delta")
    curve = plan.tradeoff()
    table.add_row(
        "an attacker finds",
        "\n".join(
            f"at most {curve.true_positive_rate(rate):.2%} of the members at "
            f"{rate:.1%} false accusations"
            for rate in _RATES
        ),
    )
    table.add_row(
        "noise", f"multiplier {plan.noise_multiplier:.5g}, clip norm {clipping.max_grad_norm:g}"
    )
    table.add_row("clipping", f"{type(clipping).__name__}: {clipping.guarantee}")
    table.add_row(
        "sampling",
        f"{sampler.describe()['sampler'].replace('_', ' ')}, rate {between(plan.rates, 5)}, "
        f"expected batch {between(plan.batch_sizes, 6)} of {sampler.public_size} {sampler.unit}s",
    )
    table.add_row("steps", f"{plan.num_steps} ({plan.epochs:.4g} epochs)")
    return table


def _reported(path: Path) -> dict[str, Any] | None:
    file = path / REPORT
    if not path.is_dir() or not file.is_file():
        return None
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        figures = {"epsilon": float(report["epsilon"]), "delta": float(report["delta"])}
        return {**figures, "sweep": report.get("sweep")}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"Expected a report with epsilon and delta in '{file}'.") from error


def _agree(reported: dict[str, Any], spent: float, found: Charged) -> bool:
    same = math.isclose(reported["epsilon"], spent, rel_tol=_TOLERANCE)
    return same and reported["delta"] == found.plan["delta"]


def _ledger_table(
    found: Charged, spent: float, reported: dict[str, Any] | None, agrees: bool, path: Path
) -> Table:
    plan = found.plan
    table = Table(title=f"dpsgd: ledger of {path}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row(
        "spent",
        f"epsilon {spent:.4f}, delta {plan['delta']:g} "
        f"({accounting.neighbouring(plan['adjacency'], plan['unit'])}, "
        f"{plan['accountant'].upper()})",
    )
    table.add_row("steps", f"{found.steps} charged of {plan['num_steps']} planned")
    chain = "verified" if found.verified else "not verified: its key is not beside it (private/)"
    table.add_row("chain", chain)
    end = "ended" if found.ended else f"did not end: {_unfinished(path)}"
    if len(found.attempts) > 1:
        every = [
            {"first_step": a.start, "charged_steps": sum(n for _, n in a.noise)}
            for a in found.attempts
        ]
        table.add_row("attempts", attempts_in_words(every))
    table.add_row("run", end + (", its last line is torn and counts as a step" * found.torn))
    if reported is not None and reported["sweep"] is not None:
        sweep = reported["sweep"]
        table.add_row(
            "its sweep",
            f"epsilon {sweep['epsilon']:.4f}, delta {sweep['delta']:g} by {sweep['accounting']}: "
            "the guarantee if it was chosen for its result",
        )
    if reported is not None:
        words = "agrees" if agrees else f"DISAGREES: it says epsilon {reported['epsilon']:.4f}"
        table.add_row("its report", words, style=None if agrees else "bold red")
    return table


def _unfinished(path: Path) -> str:
    words = "the last step charged may not have happened"
    if (path / "private" / KEY).exists():
        return f"{words}. python -m dpsgd.train resume={path} goes on with it"
    return words


def main() -> None:
    """The command."""
    console = Console()

    def task(config: DictConfig) -> None:
        if config.ledger is None:
            account(config, console, cli.typed())
        elif not verify(Path(config.ledger).expanduser(), console):
            sys.exit(EXIT_MISMATCH)

    cli.run(task, "account")


if __name__ == "__main__":
    main()
