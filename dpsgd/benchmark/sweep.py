"""How cost grows: one setting, several values, a curve for each system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from omegaconf import DictConfig, OmegaConf

from dpsgd.benchmark.measurement import Measurement
from dpsgd.benchmark.results import Results

_MARKERS = "osD^vP*X<>"


def setting_and_values(config: DictConfig) -> tuple[str, list[Any]]:
    """Returns the setting that `bench.sweep` names, and its values.

    Raises:
        ValueError: If it is not `{setting: [value, value, ...]}`, or there is no such setting.
    """
    sweep: Any = OmegaConf.to_container(config.bench, resolve=True)
    sweep = sweep["sweep"]
    usable = isinstance(sweep, dict) and len(sweep) == 1
    key, values = next(iter(sweep.items())) if usable else ("", None)
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(
            "Expected bench.sweep={setting:[value,value,...]} with at least two values, for "
            f"example bench.sweep={{bench.batch_size:[32,64,128]}}, got {sweep!r}."
        )
    if OmegaConf.select(config, key) is None:
        raise ValueError(f"Expected bench.sweep to name a setting, but there is no '{key}'.")
    return str(key), values


def with_setting(config: DictConfig, key: str, value: Any) -> DictConfig:
    """Returns a copy of the configuration with another value of one setting."""
    changed = config.copy()
    OmegaConf.update(changed, key, value, merge=False)
    changed.bench.sweep = None
    return changed


def save_curves(key: str, values: Sequence[Any], found: Sequence[Results], path: Path) -> None:
    """Writes a picture of time, ratio to ordinary training and memory against the setting.

    Args:
        key: The setting.
        values: Its values; numbers make a logarithmic axis.
        found: The results for each.
        path: A .png, .pdf or .svg file.
    """
    numbers = all(isinstance(value, int | float) and value > 0 for value in values)
    places = list(values) if numbers else list(range(len(values)))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "time of a step (ms)": lambda m, base: None if m.median is None else 1e3 * m.median,
        "time / ordinary training": lambda m, base: m.ratio(base),
        "peak memory of a step (MiB)": lambda m, base: m.memory and m.memory.peak_mib,
    }
    axes = figure.subplots(1, len(panels))
    names = [m.name for m in found[0].measurements]
    for axis, (heading, value_of) in zip(axes, panels.items()):
        for index, name in enumerate(names):
            rows = [_named(results, name) for results in found]
            heights = [value_of(m, r.baseline) for m, r in zip(rows, found)]
            drawn = [(x, y) for x, y in zip(places, heights) if y is not None and y > 0]
            if drawn:
                axis.plot(
                    *zip(*drawn),
                    marker=_MARKERS[index % len(_MARKERS)],
                    markersize=4,
                    linewidth=1.3,
                    color="#8c8c8c" if index == 0 else f"C{index - 1}",
                    label=name,
                )
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        if numbers:
            axis.set_xscale("log")
            axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(places, [str(value) for value in values])
        axis.set_xlabel(key)
        axis.set_title(heading, fontsize=10)
        axis.grid(visible=True, linewidth=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(found[0].title, fontsize=10, fontweight="bold")
    figure.savefig(path, dpi=160)


def _named(results: Results, name: str) -> Measurement:
    return next(m for m in results.measurements if m.name == name)
