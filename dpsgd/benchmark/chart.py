"""The results as a bar chart: time and memory of each system."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dpsgd.benchmark.measurement import Measurement
from dpsgd.benchmark.results import Results

_BASELINE_COLOR = "#8c8c8c"
_COLOR = "#2f6c9e"
_LOG_SPAN = 10  # a logarithmic axis if the values span more than this factor
_WIDTH = 8.0  # inches
_LINE = 0.128  # inches per line of the list of refusals


def save_chart(results: Results, path: Path) -> None:
    """Writes a chart of ratio and peak memory, the systems that refused listed below it.

    Args:
        results: The measurements.
        path: A .png, .pdf or .svg file.
    """
    shown = [m for m in results.measurements if m.refusal is None]
    refusals = _refusals(results.measurements)
    bars = 0.30 * len(shown)
    height = 1.4 + bars + _LINE * len(refusals)
    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasAgg(figure)
    panels = _panels(shown, results.baseline)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    bottom = 0.55 + _LINE * len(refusals)
    left = 0.25 + 0.072 * max(len(m.name) for m in shown)
    figure.subplots_adjust(
        left=left / _WIDTH, right=0.97, top=1 - 0.6 / height, bottom=bottom / height, wspace=0.12
    )
    for axis, (heading, values, text, errors) in zip(axes, panels):
        _draw(axis, values, text, errors)
        axis.set_xlabel(heading)
    axes[0].set_yticks(range(len(shown)), [m.name for m in shown])
    axes[0].set_ylim(len(shown) - 0.4, -0.6)
    axes[0].axvline(1, color="black", linewidth=0.8, linestyle=":")
    figure.text(0.02, 1 - 0.12 / height, results.title, va="top", fontsize=10, fontweight="bold")
    figure.text(0.02, 1 - 0.34 / height, results.method, va="top", fontsize=7.5, color="#555")
    if refusals:
        figure.text(
            0.02, 0.06 / height, "\n".join(refusals), va="bottom", fontsize=7.5, color="#555"
        )
    figure.savefig(path, dpi=200)


Panel = tuple[str, list[float], Callable[[float], str], list[list[float]] | None]


def _panels(shown: Sequence[Measurement], baseline: Measurement) -> list[Panel]:
    ratios = [m.ratio(baseline) or 0.0 for m in shown]
    panels: list[Panel] = [
        ("time of a step / ordinary training", ratios, _times, _errors(shown, baseline))
    ]
    peaks = [m.memory.peak_mib for m in shown if m.memory is not None]
    if len(peaks) == len(shown):
        panels.append(("peak memory of a step (MiB)", peaks, "{:,.0f}".format, None))
    return panels


def _errors(shown: Sequence[Measurement], baseline: Measurement) -> list[list[float]]:
    """Ends of the intervals of the medians, as distances from the bars' ends."""
    unit = baseline.median or 1.0
    pairs = [(m.median, m.interval) for m in shown]
    below = [(median - i.low) / unit if median and i else 0.0 for median, i in pairs]
    above = [(i.high - median) / unit if median and i else 0.0 for median, i in pairs]
    return [below, above]


def _draw(axis: Any, values: Sequence[float], text: Callable[[float], str], errors: Any) -> None:
    """One panel of horizontal bars, ordinary training in grey."""
    colors = [_BASELINE_COLOR] + [_COLOR] * (len(values) - 1)
    style = {"elinewidth": 0.9, "capsize": 2, "ecolor": "black"}
    places = range(len(values))
    axis.barh(places, values, height=0.66, color=colors, xerr=errors, error_kw=style)
    positive = [value for value in values if value > 0]
    logarithmic = bool(positive) and max(positive) > _LOG_SPAN * min(positive)
    ends = errors[1] if errors is not None else [0.0] * len(values)
    if logarithmic:
        axis.set_xscale("log")
        axis.set_xlim(min(positive) / 2, max(positive) * (max(positive) / min(positive)) ** 0.2)
        labelled = (1.0, 2.0, 5.0) if max(positive) < 50 * min(positive) else (1.0,)
        axis.xaxis.set_major_locator(LogLocator(subs=labelled, numticks=12))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    else:
        axis.set_xlim(0, max([*values, 1.0]) * 1.2)
    for place, value, end in zip(places, values, ends):
        axis.annotate(
            text(value), (value + end, place), (4, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="both", labelsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def _refusals(measurements: Sequence[Measurement]) -> list[str]:
    """The reasons of the systems without bars, wrapped to the chart's width."""
    lines: list[str] = []
    for m in measurements:
        if m.refusal is not None:
            words = f"{m.name} refused: {' '.join(m.refusal.split())}"
            lines += textwrap.wrap(words, 125, subsequent_indent="    ", max_lines=3)
    return lines
