"""The final report as a page that can be handed on: self-contained, readable without its markup."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from functools import cache
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpsgd import metrics

# What is drawn in these stand-ins takes its colour from the page, which may be dark or light.
_INK, _ACCENT, _MUTED, _LINE = "#010101", "#020202", "#030303", "#040404"
_COLORS = {
    _INK: "currentColor",
    _ACCENT: "var(--accent)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dpsgd",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}
_TICKS = [1, 2, 2.5, 5, 10]
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def html_report(report: Mapping[str, Any], config: str) -> str:
    """Returns the report as one HTML page, the same bytes for the same report.

    The page needs no script and nothing from outside. Its contents follow the list of what to
    report of Ponomareva et al. (2023), arXiv:2303.00654. Bounds that an attacker must not exceed
    are rounded up, so that what the page says holds.

    Args:
        report: What `dpsgd.report.final_report` returns, with an entry `sweep` if the run was one
            of several.
        config: The resolved configuration as YAML, without a key.
    """
    history = report["history"]
    found = sorted({name for row in history for name in row if name.startswith("test_")})
    metric = metrics.headline(dict.fromkeys(found, 0.0)) or (found or [None])[0]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            r=report,
            config=config,
            guarantee=_guarantee(report),
            sweep=report.get("sweep"),
            noise=_by_step(report["noise_multiplier"], report["noise_schedule"]),
            batches=_by_step(
                report["expected_batch_size"], report["sampling"].get("schedule", {"0": 1.0})
            ),
            norms=_by_step(report["max_grad_norm"], report.get("clipping_schedule", {"0": 1.0})),
            metric=metric,
            metrics=found,
            routes=_routes(report["routes"]),
            spent=_spent(report),
            spending=_spending(report),
            utility=_utility(history, metric),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dpsgd"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        up=_up, share=_share, number=_number, count=_count, value=_value, name=_name, odds=_odds
    )
    return environment


# Figures in words

_LARGEST = 700.0  # e to the power of more than that is no float


def _up(value: float, digits: int = 3) -> str:
    """Rounds up to so many significant digits: 2.9982 is at most 3.00."""
    if not math.isfinite(value):
        return "infinite" if value > 0 else str(value)
    exact = Decimal(repr(float(value)))
    if exact == 0:
        return "0"
    unit = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    rounded = exact.quantize(unit, rounding=ROUND_CEILING)
    if rounded.adjusted() > exact.adjusted():  # 9.996 becomes 10.0, not 10.00
        rounded = rounded.quantize(unit.scaleb(1))
    return f"{rounded:,f}" if -5 <= rounded.adjusted() < 9 else f"{rounded:.{digits - 1}e}"


def _share(bound: float) -> str:
    """An upper bound on a share as a percentage, rounded up."""
    percent = min(Decimal(repr(float(bound))) * 100, Decimal(100))
    unit = Decimal("0.1") if percent >= 1 else Decimal("0.01")
    return f"{percent.quantize(unit, rounding=ROUND_CEILING).normalize():f}%"


def _number(value: float) -> str:
    """A figure as it was set or measured, to seven digits."""
    return f"{value:,.7g}" if 1e-4 <= abs(value) < 1e7 else f"{value:.7g}"


def _count(value: int) -> str:
    return f"{value:,}"


def _value(value: float, name: str) -> str:
    """A test result."""
    return metrics.shown(name, value)


def _name(name: str) -> str:
    return name.replace("_", " ")


def _odds(probability: float) -> str:
    """A probability as 1 in n, never less than it is."""
    if probability <= 0:
        return "0"
    inverse = max(1.0, 1 / probability)
    whole = round(inverse)
    return f"1 in {whole if math.isclose(whole, inverse, rel_tol=1e-9) else int(inverse):,}"


def _guarantee(report: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for the released model: that of the run, or of the choice among several runs."""
    unit, sweep = report["unit"], report.get("sweep")
    whole = unit if unit == "record" else f"{unit} with all of its records"
    changed = (
        f"adding or removing one {whole}"
        if report["adjacency"] == "add_remove"
        else f"replacing one {whole} by another"
    )
    epsilon, delta, found = report["epsilon"], report["delta"], report["true_positive_rates"]
    if sweep is not None:
        epsilon, delta = sweep["epsilon"], sweep.get("delta", delta)
        found = {rate: _most_found(float(rate), epsilon, delta) for rate in found}
    return {
        "epsilon": epsilon,
        "delta": delta,
        "changed": changed,
        "factor": math.exp(epsilon) if epsilon <= _LARGEST else None,
        "attacks": [(float(rate), power) for rate, power in found.items()],
    }


def _most_found(false_positive_rate: float, epsilon: float, delta: float) -> float:
    """The most power of an attack under any (epsilon, delta) guarantee (Kairouz et al. 2015)."""
    factor = math.exp(min(epsilon, _LARGEST))
    by_accusing = factor * false_positive_rate + delta
    by_sparing = 1 - (1 - delta - false_positive_rate) / factor
    return min(1.0, by_accusing, by_sparing)


def _by_step(value: float, schedule: Mapping[str, float]) -> list[tuple[int, float]]:
    """The number of steps after which a scheduled value holds, and the value, in order."""
    factors = {int(step): factor for step, factor in schedule.items()}
    return [(step, value * factors[step]) for step in sorted(factors)]


def _routes(routes: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """The parameters of each route, the most common route first."""
    found: dict[str, list[str]] = {}
    for name, route in routes.items():
        found.setdefault(route, []).append(name)
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))


def _spent(report: Mapping[str, Any]) -> list[tuple[int, float]]:
    """The steps at which epsilon was computed, as far as they were charged, and epsilon."""
    curve, charged = report["epsilon_curve"], report["charged_steps"]
    if len(report["attempts"]) > 1:  # the curve is by the steps that count, not by those charged
        charged = report["steps"]
    before = [point for point in zip(curve["steps"], curve["epsilons"]) if point[0] < charged]
    return [*before, (charged, report["epsilon"])]


# Pictures


def _spending(report: Mapping[str, Any]) -> Markup | None:
    """Epsilon against steps: of the steps charged, and dotted of those that the plan had left.

    None if an epsilon is infinite.
    """
    curve, spent = report["epsilon_curve"], _spent(report)
    planned = list(zip(curve["steps"], curve["epsilons"]))
    end = spent[-1]
    left = [end] + [point for point in planned if point[0] > end[0]]
    if not all(math.isfinite(epsilon) for _, epsilon in [*spent, *left]):
        return None

    def draw(axes: Axes) -> None:
        if len(left) > 1:
            axes.plot(*zip(*left), color=_MUTED, linestyle=":", linewidth=1.6)
        axes.plot(*zip(*spent), color=_ACCENT, linewidth=2, marker="o", markersize=2.6)
        axes.axvline(report["steps"], color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        right = max(1, report["planned_steps"], end[0]) * 1.03
        axes.set_xlim(0, right)
        axes.set_ylim(0, max(1e-9, *(y for _, y in planned), end[1]) * 1.22)
        early = end[0] < 0.5 * right
        _label(axes, end, f"{_up(end[1])} after {end[0]:,}", right=early, above=not early)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_TICKS))
        axes.set(xlabel="steps", title="epsilon")

    return _svg(draw, "spending", "Epsilon against training steps")


def _utility(history: Sequence[Mapping[str, float]], metric: str | None) -> Markup | None:
    """A test result against epsilon; None if there is no finite one."""
    rows = [(row["epsilon"], row[metric]) for row in history if metric in row] if metric else []
    points = [point for point in rows if all(map(math.isfinite, point))]
    if metric is None or not points:
        return None
    accuracy = metric.endswith("accuracy")
    drawn = [(x, 100 * y if accuracy else y) for x, y in points]

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*drawn), color=_ACCENT, linewidth=2, marker="o", markersize=3.4)
        axes.margins(x=0.06, y=0.22)
        axes.set_xlim(0, None)
        rising = drawn[-1][1] >= drawn[0][1]
        _label(axes, drawn[-1], _value(points[-1][1], metric), right=False, above=rising)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_TICKS))
        axes.set_title(f"{_name(metric)}{', %' if accuracy else ''}", parse_math=False)
        axes.set(xlabel="epsilon")

    return _svg(draw, "utility", f"{_name(metric).capitalize()} against epsilon")


def _label(axes: Axes, at: tuple[float, float], text: str, *, right: bool, above: bool) -> None:
    axes.plot(*at, color=_ACCENT, marker="o", markersize=6)
    axes.annotate(
        text,
        at,
        xytext=(8 if right else -6, 8 if above else -7),
        textcoords="offset points",
        ha="left" if right else "right",
        va="bottom" if above else "top",
        fontsize=10,
        fontweight="bold",
    )


def _svg(draw: Callable[[Axes], None], name: str, title: str) -> Markup:
    """What `draw` draws, as an element that takes its colours and its font from the page."""
    drop = ("backend", "interactive", "toolbar", "timezone")
    style: Any = {k: v for k, v in matplotlib.rcParamsDefault.items() if k not in drop}
    with matplotlib.rc_context(style | _STYLE):
        figure = Figure(figsize=(4.1, 2.7), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(facecolor="none")
        draw(axes)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=_TICKS))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=_NO_METADATA)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    label = Markup.escape(title)
    opening = f'<svg {box[0]} role="img" aria-label="{label}"><title>{label}; on its axes:</title>'
    text = opening + text[text.index(">") + 1 :]
    text = re.sub(r' id="([^"]*)"', rf' id="{name}-\1"', text)
    text = re.sub(r'(?:xlink:)?href="#([^"]*)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r"font: (?:(bold|\d+) )?([\d.]+)px [^;\"]*", _font, text)
    for color, of_page in _COLORS.items():
        text = text.replace(color, of_page)
    text = re.sub(r"\s*\n\s*", " ", text).strip()  # its words in one line for who reads no markup
    return Markup(text)


def _font(match: re.Match[str]) -> str:
    weight = f"font-weight: {match[1]}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}px"
