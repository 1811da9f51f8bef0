"""What audits measure beside what is claimed: `python experiments/audit/run.py`.

Writes audits.json and audit.png beside this file. Some three minutes on two free cores; a second
call does only what is missing, `--again` all of it.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import new_figure, settings, start

from dpsgd import rng
from dpsgd.auditing import Subject, audit_one_run, audit_two_worlds
from dpsgd.noise import Gaussian
from dpsgd.preparation import assembled, prepare

HERE = Path(__file__).parent
AUDITS = HERE / "audits.json"
CLAIMS = (0.5, 1, 2, 4, 8)
CONFIG = ("device=cpu", "model=mlp", "model.widths=[64]", "trainer.num_steps=1")
RUNS, CANARIES, CONFIDENCE = 2000, 1000, 0.95
BUG = "half the noise"
JOBS = [(claim, "as planned") for claim in CLAIMS] + [(2, BUG)]
ATTACKS = {  # of the results: label, colour, marker
    "two_worlds_gaussian": ("two worlds, Gaussian curve assumed", "C0", "o"),
    "two_worlds": ("two worlds, no assumption", "C1", "s"),
    "one_run": ("one run with 1000 canaries", "C2", "^"),
}


def halved(key: bytes) -> Gaussian:
    """Returns noise of half the standard deviation that it is asked for: a planted bug."""
    noise = Gaussian(key=key)
    add = noise.add_

    def add_half(
        sums: Mapping[str, Tensor],
        std: float,
        step: int,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        add(sums, std / 2, step, offsets)

    noise.add_ = add_half  # type: ignore[method-assign]
    return noise


def audited(job: tuple[float, str]) -> dict[str, Any]:
    """Returns what both audits of a claim measure."""
    torch.set_num_threads(1)
    claim, noise = job
    config = settings([*CONFIG, f"privacy.target_epsilon={claim}"], "audit")
    trainer, _ = prepare(config, assembled(config), rng.fresh_key())
    subject = Subject(trainer, halved if noise == BUG else lambda key: Gaussian(key=key))
    worlds = audit_two_worlds(subject, runs=RUNS, steps=1, confidence=CONFIDENCE, seconds=1800)
    one = audit_one_run(subject, canaries=CANARIES, steps=1, confidence=CONFIDENCE)
    assert one is not None
    return {
        "claim": claim,
        "noise": noise,
        "noise_multiplier": trainer.plan.noise_multiplier,
        "claimed": worlds.claimed,
        "two_worlds_gaussian": worlds.epsilon_gaussian,
        "two_worlds": worlds.epsilon,
        "violated": bool(worlds.violated),
        "one_run": one.epsilon,
        "runs": worlds.runs,
        "canaries": one.canaries,
    }


def study() -> list[dict[str, Any]]:
    """Returns the audits of all claims; those that are not in the file yet are done."""
    found = json.loads(AUDITS.read_text(encoding="utf-8")) if AUDITS.exists() else []
    done = {(row["claim"], row["noise"]) for row in found}
    missing = [job for job in JOBS if job not in done]
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with Progress(*columns) as progress, ProcessPoolExecutor(2, context) as pool:
        task = progress.add_task("audits", total=len(missing))
        for ended in as_completed([pool.submit(audited, job) for job in missing]):
            found.append(ended.result())
            found.sort(key=lambda row: (row["noise"], row["claim"]))
            AUDITS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            progress.advance(task)
    return found


def plot(found: list[dict[str, Any]]) -> None:
    """Draws the lower bounds against the claim, and the line that none should be above."""
    figure = new_figure(5.6, 4.6)
    axes = figure.add_subplot()
    ends = [0.4, 10]
    axes.plot(ends, ends, "k", linewidth=1, label="what is claimed")
    axes.fill_between(ends, ends, 30, color="C3", alpha=0.08, linewidth=0)
    axes.text(0.45, 6.5, "above the line: the claim is false", color="C3", fontsize=8)
    planned = [row for row in found if row["noise"] != BUG]
    for name, (label, color, marker) in ATTACKS.items():
        shown = [row for row in planned if row[name] > 0.05]
        axes.plot(
            [row["claimed"] for row in shown],
            [row[name] for row in shown],
            color=color,
            marker=marker,
            label=label,
        )
    bug = next(row for row in found if row["noise"] == BUG)
    for name, (_, color, marker) in ATTACKS.items():
        label = "planted bug: half the noise" if name == "two_worlds_gaussian" else None
        axes.plot(
            [bug["claimed"]],
            [bug[name]],
            marker,
            color=color,
            markersize=10,
            markerfacecolor="none",
            markeredgewidth=2,
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(CLAIMS, [f"{claim:g}" for claim in CLAIMS])
    ticks = (0.125, 0.25, 0.5, 1, 2, 4, 8)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(*ends)
    axes.set_ylim(0.05, 10)
    axes.set_xlabel("claimed epsilon (delta 1e-5)")
    axes.set_ylabel("measured: epsilon is at least")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(HERE / "audit.png", dpi=150)


def main() -> None:
    """Runs the study, writes its figures and prints them."""
    start((AUDITS,), __doc__)
    found = study()
    plot(found)
    for row in found:
        print(
            f"claimed {row['claimed']:.2f} ({row['noise']}): "
            + ", ".join(f"{name} {row[name]:.2f}" for name in ATTACKS)
            + f", claim contradicted: {row['violated']}"
        )


if __name__ == "__main__":
    main()
