"""Accuracy on digits at epsilon 1, 3 and 8 over five seeds: `python experiments/digits/run.py`.

Runs the experiments `digits_epsilon_*` through the command line, and writes results.json and
accuracy.png beside this file. About two minutes on two cores.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
EPSILONS = (1, 3, 8)
SEEDS = (0, 1, 2, 3, 4)
BASELINE = {
    1: 0.89,
    3: 0.933,
    8: 0.946,
}  # softmax regression with momentum, rate 0.7, 60 steps, RDP


def accuracies(epsilon: int) -> list[dict[str, Any]]:
    """Returns the reports of one run per seed, each with noise of its own."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = ",".join(map(str, SEEDS))
        command = [
            sys.executable,
            "-m",
            "dpsgd.train",
            "-m",
            f"experiment=digits_epsilon_{epsilon}",
        ]
        command += [f"seed={seeds}", f"run.dir={folder}/sweep"]
        subprocess.run(command, check=True)
        reports = sorted(Path(folder, "sweep").glob("*/report.json"))
        return [json.loads(report.read_text()) for report in reports]


def main() -> None:
    """Runs the study, writes its figures and prints them."""
    results = {}
    for epsilon in EPSILONS:
        reports = accuracies(epsilon)
        found = [report["test"]["test_accuracy"] for report in reports]
        results[str(epsilon)] = {
            "test_accuracy": found,
            "mean": statistics.mean(found),
            "standard_deviation": statistics.stdev(found),
            "epsilon_spent": max(report["epsilon"] for report in reports),
            "noise_multiplier": reports[0]["noise_multiplier"],
            "seconds": statistics.median(report["seconds"] for report in reports),
        }
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(results)
    for epsilon, row in results.items():
        print(f"epsilon {epsilon}: {row['mean']:.1%} +- {row['standard_deviation']:.1%}")


def plot(results: dict[str, dict[str, Any]]) -> None:
    """Draws mean and spread against epsilon, beside the baseline."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.errorbar(
        EPSILONS,
        [100 * results[str(e)]["mean"] for e in EPSILONS],
        [100 * results[str(e)]["standard_deviation"] for e in EPSILONS],
        marker="o",
        capsize=4,
        label="dpsgd defaults (CNN, tanh)",
    )
    axes.plot(EPSILONS, [100 * BASELINE[e] for e in EPSILONS], "k--", label="softmax regression")
    axes.set_xscale("log", base=2)
    axes.set_xticks(EPSILONS, [str(e) for e in EPSILONS])
    axes.set_xlabel("epsilon (delta 1e-5, add/remove)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("Digits, five seeds, mean and standard deviation", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "accuracy.png", dpi=150)


if __name__ == "__main__":
    main()
