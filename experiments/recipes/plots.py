"""The picture of the study, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import new_figure

EPSILONS = ("1", "3", "8")
LEAST = 85.0


def plot(results: dict[str, Any], folder: Path) -> None:
    """Draws a panel for each budget: mean and spread of each recipe, beside the baseline."""
    recipes = results["recipes"]
    figure = new_figure(11, 0.3 * len(recipes) + 1.4)
    panels = figure.subplots(1, len(EPSILONS), sharey=True)
    for axes, epsilon in zip(panels, EPSILONS):
        base = recipes["baseline"]["accuracy"][epsilon]
        mean, spread = 100 * base["mean"], 100 * base["standard_deviation"]
        axes.axvspan(mean - spread, mean + spread, color="0.9")
        axes.axvline(mean, color="0.5", linewidth=1)
        for number, row in enumerate(recipes.values()):
            cell = row["accuracy"][epsilon]
            axes.errorbar(
                [100 * cell["mean"]],
                [number],
                xerr=[100 * cell["standard_deviation"]],
                fmt="o",
                capsize=3,
                color="0.3" if number == 0 else "C0" if cell["mean"] >= base["mean"] else "C1",
            )
            if 100 * cell["mean"] < LEAST:
                axes.text(LEAST + 0.3, number, f"← {100 * cell['mean']:.0f} %", va="center")
        axes.set_xlim(LEAST, 99.5)
        axes.set_title(f"epsilon {epsilon}", fontsize=10)
        axes.set_xlabel("test accuracy (%)")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(recipes)), list(recipes))
    panels[0].invert_yaxis()
    figure.savefig(folder / "recipes.png", dpi=130)


def table(results: dict[str, Any]) -> str:
    """Returns the Markdown table of the README."""
    lines = [
        "| recipe | rate | epsilon 1 | epsilon 3 | epsilon 8 |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["recipes"].items():
        cells = (row["accuracy"][epsilon] for epsilon in EPSILONS)
        shown = (f"{100 * c['mean']:.1f} ± {100 * c['standard_deviation']:.1f}" for c in cells)
        lines.append(f"| {name} | {row['rate']:g} | {' | '.join(shown)} |")
    return "\n".join(lines)
