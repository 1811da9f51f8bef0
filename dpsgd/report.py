"""The final report: one dictionary, shown as a table."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table

from dpsgd.engines import Engine
from dpsgd.plan import PrivacyPlan


def final_report(
    plan: PrivacyPlan,
    engine: Engine,
    routes: Mapping[str, str],
    *,
    max_grad_norm: float,
    steps_taken: int,
    test: Mapping[str, float],
    seconds: float,
    interrupted: bool,
    not_private: list[str],
) -> dict[str, Any]:
    """Returns the guarantee, the result and the circumstances of a run.

    Args:
        plan: The privacy plan.
        engine: The engine that was used.
        routes: How it gets the gradients of each parameter.
        max_grad_norm: The clip norm.
        steps_taken: Releases made.
        test: Results on the test set.
        seconds: Training time.
        interrupted: Whether training ended before the plan did.
        not_private: Reasons why the run gives no guarantee, empty if it does.
    """
    return {
        "private": not not_private,
        "not_private_because": not_private,
        "epsilon": plan.epsilon(steps_taken),
        "delta": plan.delta,
        "adjacency": plan.adjacency,
        "accountant": plan.accountant,
        "noise_multiplier": plan.noise_multiplier,
        "max_grad_norm": max_grad_norm,
        "sample_rate": plan.sample_rate,
        "expected_batch_size": plan.expected_batch_size,
        "steps": steps_taken,
        "planned_steps": plan.num_steps,
        "interrupted": interrupted,
        "test": dict(test),
        "engine": type(engine).__name__,
        "routes": dict(routes),
        "parameters": sum(p.numel() for p in engine.parameters.values()),
        "device": str(next(iter(engine.parameters.values())).device),
        "seconds": round(seconds, 3),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def summary(report: Mapping[str, Any], where: str) -> RenderableType:
    """Returns the report as a table for the terminal, under a banner if it is not private."""
    ended = "interrupted" if report["interrupted"] else "finished"
    table = Table(title=f"dpsgd: training {ended}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in report["test"].items():
        shown = f"{value:.1%}" if name.endswith("accuracy") else f"{value:.4f}"
        table.add_row(name.replace("_", " "), shown)
    if not report["test"]:
        table.add_row("test accuracy", "no test set: none is claimed")
    table.add_row(
        "guarantee",
        f"epsilon {report['epsilon']:.3f}, delta {report['delta']:g} "
        f"({report['adjacency'].replace('_', '/')}, {report['accountant'].upper()})",
    )
    table.add_row(
        "noise",
        f"multiplier {report['noise_multiplier']:.4g}, clip norm {report['max_grad_norm']:g}",
    )
    table.add_row(
        "sampling",
        f"Poisson, rate {report['sample_rate']:.4g}, "
        f"expected batch {report['expected_batch_size']:.1f}",
    )
    steps = f"{report['steps']} of {report['planned_steps']}"
    table.add_row("steps", f"{steps} in {report['seconds']:.1f} s")
    ways = ", ".join(f"{way} {n}" for way, n in Counter(report["routes"].values()).items())
    table.add_row("engine", f"{report['engine']} on {report['device']} (parameters: {ways})")
    table.add_row("saved in", where)
    return Group(banner(report["not_private_because"]), table) if not report["private"] else table


def banner(reasons: list[str]) -> RenderableType:
    """Returns the NOT PRIVATE banner with its reasons."""
    return Panel("\n".join(reasons), title="NOT PRIVATE", style="bold red", expand=False)
