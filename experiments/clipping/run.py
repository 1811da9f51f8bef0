"""What the clipping policy and its C do to accuracy: `python experiments/clipping/run.py`.

Digits at epsilon 3. Writes runs.csv (a line per run), results.json and clipping.png beside this
file. Some five minutes on two free cores; a second call does only what is missing, `--again` all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Job, at, finish, new_figure, start, summarised

HERE = Path(__file__).parent
RUNS = HERE / "runs.csv"
EPSILON = 3
SEEDS, SEEDS_OF_CURVES = (0, 1, 2), (0, 1)
BOUNDS = (0.01, 0.1, 1, 3, 10)
RATES = (0.73, 2.2, 6.6)  # over the noise multiplier
CURVES = ("flat", "unit_norm")
POLICIES: dict[str, Job] = {
    "flat": ("clipping=flat",),
    "per_layer": ("clipping=per_layer",),
    "grouped": ("clipping=grouped", "clipping.patterns={bias:'*bias',weight:'*'}"),
    "automatic": ("clipping=automatic",),
    "normalised": ("clipping=normalised",),
    "adaptive": ("clipping=adaptive",),
}
POLICY_RATES = (2.2, 4.4)  # with C = 1


def cell(policy: Job, bound: float, rate: float, seeds: Sequence[int] = SEEDS) -> list[Job]:
    """Returns the jobs of a policy, a C and a learning rate, one per seed."""
    bounded = f"clipping.max_grad_norm={bound:g}"
    return [(*policy, bounded, *at(EPSILON, rate, seed)) for seed in seeds]


def study() -> dict[str, Any]:
    """Returns mean and spread of the accuracy for every cell."""
    curves = {
        (kind, rate, bound): cell((f"clipping={kind}",), bound, rate, SEEDS_OF_CURVES)
        for kind in CURVES
        for rate in RATES
        for bound in BOUNDS
    }
    policies = {
        (name, rate): cell(policy, 1, rate)
        for name, policy in POLICIES.items()
        for rate in POLICY_RATES
    }
    jobs = [job for found in (*curves.values(), *policies.values()) for job in found]
    rows = finish(jobs, RUNS, "clipping")
    results: dict[str, Any] = {
        kind: {
            f"{rate:g}": {
                f"{bound:g}": summarised(rows[job] for job in curves[kind, rate, bound])
                for bound in BOUNDS
            }
            for rate in RATES
        }
        for kind in CURVES
    }
    results["policies"] = {
        name: {
            f"{rate:g}": summarised(rows[job] for job in policies[name, rate])
            for rate in POLICY_RATES
        }
        for name in POLICIES
    }
    return results


def draw_curves(axes: Axes, results: dict[str, Any], kind: str) -> None:
    """Draws accuracy against C, a curve per learning rate."""
    for number, (rate, row) in enumerate(results[kind].items()):
        bounds = [float(bound) for bound in row]
        means, spreads = (
            [100 * cell[name] for cell in row.values()] for name in ("mean", "standard_deviation")
        )
        axes.errorbar(bounds, means, spreads, marker="o", capsize=3, color=f"C{number}", label=rate)
    axes.set_xscale("log")
    axes.set_xlabel("clip norm C")
    axes.grid(alpha=0.3)
    axes.legend(title="learning rate times\nnoise multiplier", fontsize=8, title_fontsize=8)


def plot(results: dict[str, Any]) -> None:
    """Draws the two families of curves, and the policies at their best rate."""
    figure = new_figure(11, 3.8)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
    draw_curves(left, results, "flat")
    draw_curves(middle, results, "unit_norm")
    left.set_title("flat: gradients shrunk to norm C", fontsize=10)
    middle.set_title("unit_norm: the same, divided by C", fontsize=10)
    left.set_ylabel("test accuracy (%)")
    for axes in (left, middle):
        axes.set_ylim(0, 100)
    best = {n: max(row.values(), key=lambda c: c["mean"]) for n, row in results["policies"].items()}
    right.errorbar(
        [100 * row["mean"] for row in best.values()],
        range(len(best)),
        xerr=[100 * row["standard_deviation"] for row in best.values()],
        fmt="o",
        capsize=3,
    )
    right.set_yticks(range(len(best)), list(best))
    right.invert_yaxis()
    right.set_xlabel("test accuracy (%)")
    right.set_title("policies with C = 1, each at its best rate", fontsize=10)
    right.grid(alpha=0.3)
    figure.savefig(HERE / "clipping.png", dpi=150)


def main() -> None:
    """Runs the study, writes its figures and prints them."""
    start((RUNS,), __doc__)
    results = study()
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(results)
    for name, found in results["policies"].items():
        cells = (f"{rate}: {row['mean']:.1%}" for rate, row in found.items())
        print(f"{name}: {', '.join(cells)}")


if __name__ == "__main__":
    main()
