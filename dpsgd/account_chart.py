"""Plans as pictures: epsilon against steps and what an attacker can do; noise by batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpsgd.accounting import BatchChoice
from dpsgd.plan import PrivacyPlan

_COLOR = "#2f6c9e"
_GREY = "#8c8c8c"
_MARK = "#c0504d"
_RATES = np.geomspace(1e-4, 1, 200)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Says in the user's words that a picture cannot be written.

    Raises:
        ValueError: If it cannot.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected account.plot to be a .png, .pdf or .svg file that can be written, got "
            f"'{path}': {error}"
        ) from error


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
    _save(figure, path)


def save_choices(
    choices: Sequence[BatchChoice], best: BatchChoice, sensitivity: float, unit: str, path: Path
) -> None:
    """Writes noise multiplier and noise against the batch size, one of which is marked.

    Args:
        choices: The batch sizes, ascending.
        best: The one that is recommended.
        sensitivity: Of the clipping policy, by which noise is scaled.
        unit: What a batch is made of.
        path: A .png, .pdf or .svg file.

    Raises:
        ValueError: If the file's ending is unknown.
        OSError: If it cannot be written.
    """
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    sizes = [choice.expected_batch_size for choice in choices]
    mean = [choice.noise_of_their_mean * sensitivity for choice in choices]
    panels = (
        ("noise multiplier", [choice.noise_multiplier for choice in choices]),
        ("noise of an update", [choice.noise_of_one_update * sensitivity for choice in choices]),
        ("noise of the mean of all updates", mean),
    )
    place = choices.index(best)
    for axis, (words, values) in zip(figure.subplots(1, 3), panels, strict=True):
        axis.set_xscale("log")
        axis.set_yscale("linear" if values is mean else "log")
        axis.plot(sizes, values, color=_COLOR, linewidth=2, marker=".")
        axis.plot(sizes[place], values[place], "o", color=_MARK, markersize=8)
        axis.axvline(sizes[place], color=_MARK, linestyle=":", linewidth=1)
        axis.set_xlabel(f"expected batch size ({unit}s)")
        axis.set_title(words, fontsize=10)
    figure.axes[2].set_ylim(0, 1.1 * max(mean))
    figure.axes[2].ticklabel_format(axis="y", scilimits=(-2, 2))
    figure.suptitle(
        f"recommended: {best.expected_batch_size:.0f} {unit}s a step, {best.num_steps} steps, "
        f"noise multiplier {best.noise_multiplier:.3g}",
        fontsize=10,
        color=_MARK,
    )
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)
