"""The claimed trade-off curve and what an attack measured, in one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dpsgd.accounting import TradeOff
from dpsgd.auditing.two_worlds import TwoWorlds

_COLOR = "#2f6c9e"
_RED = "#b3261e"
_GREY = "#8c8c8c"
_RATES = np.linspace(0, 1, 401)


def save_chart(result: TwoWorlds, claimed: TradeOff, path: Path) -> None:
    """Writes the errors that an attacker must make, as claimed, and those that one made.

    Args:
        result: The two-world audit.
        claimed: The plan's trade-off curve for the audited steps.
        path: A .png, .pdf or .svg file.
    """
    figure = Figure(figsize=(5.6, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    curve = [claimed(float(rate)) for rate in _RATES]
    axis.fill_between(_RATES, 0, curve, color=_RED, alpha=0.10, linewidth=0)
    axis.plot(_RATES, curve, color=_RED, linewidth=1.5, label="claimed: no attack lies below")
    axis.plot([0, 1], [1, 0], color=_GREY, linestyle=":", label="guessing")
    x = [p.false_positive_rate for p in result.points]
    y = [p.false_negative_rate for p in result.points]
    axis.plot(
        x, y, "o", color=_COLOR, markersize=4.5, label=f"measured, {result.runs} runs per world"
    )
    for number, point in enumerate(result.points):
        corner = point.false_positive_rate, point.false_negative_rate
        width = point.false_positive_upper - point.false_positive_rate
        height = point.false_negative_upper - point.false_negative_rate
        words = "up to the upper confidence bounds" if number == 0 else None
        box = Rectangle(corner, width, height, label=words, facecolor=(*to_rgb(_COLOR), 0.12))
        box.set(edgecolor=_COLOR, linewidth=0.8)
        axis.add_patch(box)
    if result.violated:
        axis.scatter(
            [p.false_positive_upper for p in result.violated],
            [p.false_negative_upper for p in result.violated],
            marker="x", s=70, color="black", zorder=3, label="violates the claim",
        )  # fmt: skip
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="false positive rate", ylabel="false negative rate")
    axis.set_aspect("equal")
    steps = "1 step" if result.steps == 1 else f"{result.steps} steps"
    axis.set_title(
        f"epsilon {result.claimed:.2f} claimed for {steps}, at least "
        f"{result.epsilon_gaussian:.2f} measured",
        fontsize=10,
    )
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)
