"""The final report: one dictionary, shown as a table."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table

from dpsgd import accounting, metrics
from dpsgd.accounting import Curve
from dpsgd.ledger import Charged
from dpsgd.plan import PrivacyPlan
from dpsgd.private_step import PrivateStep
from dpsgd.recipe import Recipe
from dpsgd.trainer import Trainer

_FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)


def final_report(
    trainer: Trainer,
    charged: Charged,
    routes: Mapping[str, str],
    *,
    until: int,
    steps_timed: int,
    history: Sequence[Mapping[str, float]],
    seconds: float,
    curve: Curve,
    not_private: list[str],
) -> dict[str, Any]:
    """Returns the guarantee, the result and the circumstances of a run.

    Args:
        trainer: What ran, as it is at the end.
        charged: What the ledger says; epsilon follows from it.
        routes: How the engine gets the gradients of each parameter.
        until: The step that training should end at.
        steps_timed: Those steps that `seconds` are of: the others were made before.
        history: The public figures of the evaluated steps.
        seconds: Training time.
        curve: Spent epsilon against steps.
        not_private: Reasons why the run gives no guarantee, empty if it does.
    """
    step, plan = trainer.step, trainer.plan
    last = history[-1] if history else {}
    return {
        "private": not not_private,
        "not_private_because": not_private,
        **_guarantee(plan, charged),
        "steps": step.step,
        "steps_timed": steps_timed,
        "attempts": [
            {"first_step": a.start, "charged_steps": sum(n for _, n in a.noise)}
            for a in charged.attempts
        ],
        "charged_steps": charged.steps,
        "planned_steps": plan.num_steps,
        "interrupted": step.step < until,
        "test": {name: value for name, value in last.items() if name.startswith("test_")},
        "history": [dict(row) for row in history],
        "epsilon_curve": {
            "steps": [0, *curve.steps],
            "epsilons": [0.0, *curve.epsilons],
        },
        **_circumstances(step, trainer.recipe),
        "routes": dict(routes),
        "seconds": round(seconds, 3),
        "versions": versions(),
    }


def _guarantee(plan: PrivacyPlan, charged: Charged) -> dict[str, Any]:
    """What is promised, and the mechanism that it follows from."""
    sampler, clipping = plan.sampler, plan.clipping
    spent = charged.releases()
    tradeoff = accounting.tradeoff_of(spent, plan.accountant, plan.adjacency)
    return {
        "epsilon": charged.epsilon(),
        "delta": plan.target_delta,
        "adjacency": plan.adjacency,
        "unit": sampler.unit,
        "accountant": plan.accountant,
        "epsilon_by_accountant": {
            name: accounting.epsilon_of(spent, plan.target_delta, name, adjacency)
            for adjacency, name in sampler.theorems
            if adjacency == plan.adjacency
        },
        "mu": accounting.mu_of(spent, plan.target_delta, plan.accountant, plan.adjacency),
        "true_positive_rates": {
            str(rate): tradeoff.true_positive_rate(rate) for rate in _FALSE_POSITIVE_RATES
        },
        "noise_multiplier": plan.noise_multiplier,
        "noise_schedule": {str(s): factor for s, factor in plan.noise_schedule.factors.items()},
        "clipping": type(clipping).__name__,
        "clipping_guarantee": clipping.guarantee,
        "max_grad_norm": clipping.max_grad_norm,
        "clipping_schedule": {str(s): f for s, f in (clipping.schedule or {0: 1.0}).items()},
        "sampling": sampler.describe(),
        "sample_rate": plan.sample_rate,
        "expected_batch_size": plan.expected_batch_size,
        "sample_rates": list(plan.rates),
        "expected_batch_sizes": list(plan.batch_sizes),
        "public_size": sampler.public_size,
    }


def _circumstances(step: PrivateStep, recipe: Recipe) -> dict[str, Any]:
    """What computed the steps, and what was added to them."""
    parameters, views = step.engine.parameters, recipe.augmentation
    return {
        "ema_decay": recipe.ema_decay,
        "views": None if views is None else str(views),
        "engine": type(step.engine).__name__,
        "parameters": sum(p.numel() for p in parameters.values()),
        "device": str(next(iter(parameters.values())).device),
        "processes": step.parallel.world.size,
    }


def where(report: Mapping[str, Any]) -> str:
    """Returns the device of a run in words, with the number of processes if there were several."""
    count = report["processes"]
    return report["device"] if count == 1 else f"{report['device']} in {count} processes"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that the guarantee rests on."""
    names = ("dpsgd", "torch", "dp-accounting", "cryptography", "opacus")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def summary(report: Mapping[str, Any], folder: str) -> RenderableType:
    """Returns the report as a table for the terminal, under a banner if it is not private."""
    ended = "interrupted" if report["interrupted"] else "finished"
    table = Table(title=f"dpsgd: training {ended}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in report["test"].items():
        table.add_row(name.replace("_", " "), metrics.shown(name, value))
    if not report["test"]:
        table.add_row("test result", "no test set: none is claimed")
    table.add_row(
        "guarantee",
        f"epsilon {report['epsilon']:.3f}, delta {report['delta']:g} "
        f"({accounting.neighbouring(report['adjacency'], report['unit'])}, "
        f"{report['accountant'].upper()})",
    )
    if "sweep" in report:
        sweep = report["sweep"]
        table.add_row(
            "of the sweep",
            f"epsilon {sweep['epsilon']:.3f}, delta {sweep['delta']:g}: the guarantee of a run "
            f"that was chosen for its result ({sweep['accounting']})",
        )
    table.add_row(
        "in plain words",
        f"an attack that falsely accuses 1 in 100 finds at most "
        f"{report['true_positive_rates']['0.01']:.1%} of the {report['unit']}s that were used",
    )
    table.add_row(
        "noise",
        f"multiplier {report['noise_multiplier']:.4g}, clip norm {report['max_grad_norm']:g} "
        f"({report['clipping']})",
    )
    table.add_row(
        "sampling",
        f"{report['sampling']['sampler'].replace('_', ' ')}, "
        f"rate {between(report['sample_rates'], 4)}, "
        f"expected batch {between(report['expected_batch_sizes'], 5)}",
    )
    steps = f"{report['steps']} of {report['planned_steps']}"
    table.add_row("steps", f"{steps}{timed(report)}")
    if len(report["attempts"]) > 1:
        table.add_row("attempts", attempts_in_words(report["attempts"]))
    ways = ", ".join(f"{way} {n}" for way, n in Counter(report["routes"].values()).items())
    table.add_row("engine", f"{report['engine']} on {where(report)} (parameters: {ways})")
    if report["views"] is not None:
        table.add_row("views", report["views"])
    if report["ema_decay"] is not None:
        table.add_row("weights", f"their moving average, decay {report['ema_decay']:g}")
    table.add_row("saved in", folder)
    return Group(banner(report["not_private_because"]), table) if not report["private"] else table


def between(ends: Sequence[float], digits: int) -> str:
    """Returns the least and the largest number in words, or the one number that both are."""
    least, largest = (f"{end:.{digits}g}" for end in ends)
    return least if least == largest else f"{least} to {largest}"


def timed(report: Mapping[str, Any]) -> str:
    """Returns how long the steps took: all of them, or those since the run went on."""
    seconds = f"{report['seconds']:.1f} s"
    if report["steps_timed"] == report["steps"]:
        return f" in {seconds}"
    return f", the last {report['steps_timed']} of them in {seconds}"


def attempts_in_words(attempts: Sequence[Mapping[str, int]]) -> str:
    """Returns what each attempt at a run charged."""
    parts = [f"{a['charged_steps']} steps from step {a['first_step']} on" for a in attempts]
    return f"{len(parts)}: {', then '.join(parts)}; what was repeated is charged twice"


def caution(words: str) -> RenderableType:
    """Returns what somebody should know before they go on, as a panel."""
    return Panel(words, title="Note", style="yellow", expand=False)


def banner(reasons: list[str]) -> RenderableType:
    """Returns the NOT PRIVATE banner with its reasons."""
    return Panel("\n".join(reasons), title="NOT PRIVATE", style="bold red", expand=False)
