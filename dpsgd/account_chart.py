"""A plan as a picture: epsilon against steps, and what an attacker can do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpsgd.plan import PrivacyPlan

_COLOR = "#2f6c9e"
_GREY = "#8c8c8c"
_RATES = np.geomspace(1e-4, 1, 200)


def save_chart(plan: PrivacyPlan, path: Path) -> None:
    """Writes epsilon against steps, and the power of the best attack against its false positives.

    Args:
        plan: The plan.
        path: A .png, .pdf or .svg file.

    Raises:
        ValueError: If the file's ending is unknown.
        OSError: If it cannot be written.
    """
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    spending, attack = figure.subplots(1, 2)
    curve = plan.curve
    spending.plot([0, *curve.steps], [0.0, *curve.epsilons], color=_COLOR, linewidth=2)
    spending.set(xlabel="steps", ylabel=f"epsilon at delta {plan.target_delta:g}")
    spending.set_xlim(0, plan.num_steps)
    spending.set_ylim(0)
    spending.set_title(
        f"epsilon {curve.epsilons[-1]:.2f} after {plan.num_steps} steps", fontsize=10
    )
    trade = plan.tradeoff()
    power = [trade.true_positive_rate(float(rate)) for rate in _RATES]
    attack.loglog(_RATES, power, color=_COLOR, linewidth=2, label="the best attack at most")
    attack.loglog(_RATES, _RATES, color=_GREY, linestyle=":", label="guessing")
    attack.set_title("an attack on one member", fontsize=10)
    attack.set(xlabel="false positive rate", ylabel="true positive rate")
    attack.set_xlim(1e-4, 1)
    attack.set_ylim(1e-4, 1.3)
    attack.legend(frameon=False, loc="lower right")
    for axis in (spending, attack):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)
