"""The final report as a page of its own: for people who have to trust a run."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_BLUE = "#2f6c9e"
_INK = "#010203"  # stands for the colour of the text around the picture
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dpsgd",
    "font.size": 11,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_CHANGE = {
    "add_remove": "adding or removing one {unit}",
    "replace_one": "replacing one {unit} by another",
}
_SAMPLING = {
    "poisson": "Poisson: every {unit} joins a step by a coin of its own",
    "truncated_poisson": "Poisson, cut to a largest batch",
    "user_poisson": "Poisson, by user: every user joins a step by a coin of its own",
    "shuffled": "fixed batches of the shuffled data, no amplification by sampling",
}


def html_report(report: Mapping[str, Any], config: str) -> str:
    """Returns a self-contained page: no script, nothing loaded from elsewhere, readable as text.

    It has what Ponomareva et al. (2023), arXiv:2303.00654, ask of a report on private training. The
    same report gives the same bytes.

    Args:
        report: The final report (`dpsgd.report.final_report`).
        config: The resolved configuration as YAML, without a key.
    """
    environment = Environment(
        loader=PackageLoader("dpsgd"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    unit = report["unit"]
    return environment.get_template("report.html.j2").render(
        r=report,
        config=config,
        sweep=report.get("sweep"),
        change=_CHANGE[report["adjacency"]].format(unit=unit),
        sampling=_SAMPLING.get(report["sampling"]["sampler"], "{unit}s").format(unit=unit),
        others={
            name: value
            for name, value in report["epsilon_by_accountant"].items()
            if name != report["accountant"]
        },
        attacks=[(_one_in(rate), power) for rate, power in report["true_positive_rates"].items()],
        routes=sorted(Counter(report["routes"].values()).items()),
        spending=_spending(report),
        utility=_utility(report["history"]),
        constant_noise=set(report["noise_schedule"].values()) == {1.0},
    )


def _one_in(rate: str) -> str:
    return f"1 in {round(1 / float(rate)):,}"


def _spending(report: Mapping[str, Any]) -> Markup:
    curve = report["epsilon_curve"]
    figure, axis = _figure()
    axis.plot(curve["steps"], curve["epsilons"], color=_BLUE, linewidth=2)
    spent = [report["charged_steps"]], [report["epsilon"]]
    axis.plot(*spent, "o", color=_BLUE, markersize=7, clip_on=False)
    axis.set(xlabel="steps", ylabel="epsilon", ylim=(0, None), xlim=(0, curve["steps"][-1]))
    return _svg(figure, "Epsilon spent against steps")


def _utility(history: Sequence[Mapping[str, float]]) -> Markup | None:
    """Accuracy, or else loss, against epsilon; None without a test set."""
    names = [name for name in ("test_accuracy", "test_loss") if history and name in history[0]]
    if not names:
        return None
    name = names[0]
    figure, axis = _figure()
    rows = [(row["epsilon"], row[name]) for row in history if name in row]
    axis.plot(*zip(*rows), "o-", color=_BLUE, linewidth=2, markersize=5)
    axis.set(xlabel="epsilon spent", ylabel=name.replace("_", " "))
    if name == "test_accuracy":
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _svg(figure, f"{name.replace('_', ' ').capitalize()} against the epsilon spent")


def _figure() -> tuple[Figure, Any]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 2.9), layout="constrained")
        axis = figure.subplots()
        axis.grid(alpha=0.2, color=_INK)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an element that takes its text colour and font from the page."""
    with mpl.rc_context(_STYLE):
        FigureCanvasSVG(figure)
        stream = io.StringIO()
        figure.savefig(
            stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    start = text.find("<metadata>")
    if start >= 0:
        end = text.index("</metadata>") + len("</metadata>")
        text = text[:start] + text[end:]
    return Markup(text)
