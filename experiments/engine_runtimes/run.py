"""What private training costs beside ordinary training, on ten workloads, and how that grows.

    python experiments/engine_runtimes/run.py [WORKLOAD ...]   # draw: measure nothing

Runs `python -m dpsgd.bench` on each workload of configs/workload (about half an hour for all, on
two cores), keeps its JSON in results/, and draws and lists everything that is there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

HERE = Path(__file__).parent
RESULTS = HERE / "results"
COMMON = ["bench.repetitions=11", "bench.max_seconds=8", "device=cpu"]
ENGINES = (
    "bench.engines=[{non-private:{compile:true}},ghost,hooks,vmap,{vmap:{compile:true}},opacus]"
)

TARGETS: Mapping[str, tuple[float | None, float | None, float | None]] = {
    "mlp": (1.12, 1.00, 1.8),
    "mnist_cnn": (1.30, 1.15, 1.6),
    "cifar_cnn": (1.25, 1.10, 1.4),
    "wrn16_4": (1.25, 1.10, 1.5),
    "transformer": (1.20, 1.10, 1.5),
    "char_lstm": (1.6, 1.25, 5.0),
    "bag": (2.0, 1.3, 5.0),
    "lora": (1.05, 1.02, 1.0),
    "tiny_mlp": (None, 1.5, None),
    "tiny_gpt": (None, 1.5, None),
}
"""By workload: the ratio of ghost to ordinary training that it must have and that it aims at, and
how many times faster than Opacus's best mode it must be."""

SWEEPS: Mapping[str, tuple[str, str, str]] = {
    "batch_size": ("mnist_cnn", "bench.batch_size", "[32,128,512,2048]"),
    "sequence_length": ("transformer", "data.input_shape", "[[32],[64],[128],[256]]"),
    "width": ("mlp", "model.widths", "[[256,256],[512,512],[1024,1024],[2048,2048]]"),
}
SWEPT = "bench.engines=[ghost,vmap,{opacus:{mode:hooks}},{opacus:{mode:ghost}}]"


def measure(name: str, workload: str, extra: Sequence[str]) -> None:
    """Runs the benchmark in a process of its own and keeps its JSON (and picture of a sweep)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dpsgd.bench", "--config-dir", str(HERE / "configs")]
        command += [f"+workload={workload}", *COMMON, *extra, f"bench.dir={folder}/out"]
        subprocess.run(command, check=True, cwd=HERE.parents[1])
        RESULTS.mkdir(exist_ok=True)
        shutil.copy(f"{folder}/out/bench.json", RESULTS / f"{name}.json")
        if name in SWEEPS:
            shutil.copy(f"{folder}/out/bench.png", HERE / f"{name}.png")


def figures(workload: str) -> dict[str, dict[str, Any]] | None:
    """Returns the systems of a workload by name, None if it has not been measured."""
    path = RESULTS / f"{workload}.json"
    if not path.exists():
        return None
    return {row["name"]: row for row in json.loads(path.read_text())["systems"]}


def best(rows: Mapping[str, Mapping[str, Any]], prefix: str) -> tuple[str, float] | None:
    """Returns the fastest system of a family and its ratio."""
    ran = [(row["ratio"], name) for name, row in rows.items() if name.startswith(prefix)]
    ran = [(ratio, name) for ratio, name in ran if ratio is not None]
    return (min(ran)[1], min(ran)[0]) if ran else None


def table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the comparison as a Markdown table."""
    lines = [
        "| workload | ordinary ms | compiled | **ghost** | must / stretch | memory "
        "| best Opacus | ghost faster by (must) | hooks | vmap | vmap compiled |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in measured.items():
        must, stretch, rival = TARGETS[name]
        ghost, base = rows["ghost"], rows["non-private"]
        opacus = best(rows, "opacus")
        faster = None if opacus is None else opacus[1] / ghost["ratio"]
        memory = ghost["memory"]["peak_mib"] / base["memory"]["peak_mib"]
        cells = [
            name,
            f"{1e3 * base['median_seconds']:.1f}",
            _ratio(rows, "non-private-compile"),
            f"**{ghost['ratio']:.2f}**",
            f"{must or '-'} / {stretch}",
            f"{memory:.2f}x",
            "refuses" if opacus is None else f"{opacus[1]:.2f} ({opacus[0][7:]})",
            "-" if faster is None else f"{faster:.2f}x" + (f" ({rival})" if rival else ""),
            *(_ratio(rows, system) for system in ("hooks", "vmap", "vmap-compile")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(rows: Mapping[str, Any], name: str) -> str:
    if name not in rows:
        return "-"
    return "refuses" if rows[name]["ratio"] is None else f"{rows[name]['ratio']:.2f}"


def draw(measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws time and memory of each family beside ordinary training, by workload."""
    families = {
        "ghost": "ghost",
        "opacus": "Opacus, best mode",
        "vmap": "vmap, best",
        "hooks": "hooks",
    }
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    times, memory = figure.subplots(2, 1, sharex=True)
    for index, (prefix, label) in enumerate(families.items()):
        heights: list[tuple[float, float]] = []
        for place, rows in enumerate(measured.values()):
            found = best(rows, prefix)
            if found is None:
                continue
            x = place + 0.2 * (index - 1.5)
            heights.append((x, found[1]))
            used, base = rows[found[0]]["memory"], rows["non-private"]["memory"]
            if used is not None:
                share = used["peak_mib"] / base["peak_mib"]
                memory.bar(x, share, 0.19, color=f"C{index}")
        xs, ys = zip(*heights)
        bars = times.bar(xs, ys, 0.19, color=f"C{index}", label=label)
        times.bar_label(bars, [f"{y:.2f}" if y < 10 else f"{y:.0f}" for y in ys], fontsize=6.5)
    for axis, heading in ((times, "time of a step"), (memory, "peak memory of a step")):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_ylabel(f"{heading} /\nordinary training", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    memory.set_xticks(range(len(measured)), list(measured), fontsize=9)
    times.set_ylim(top=200)
    times.legend(fontsize=8, ncols=4, loc="upper right", frameon=False)
    figure.savefig(HERE / "engine_runtimes.png", dpi=160)


def main(chosen: Sequence[str]) -> None:
    """Measures the chosen workloads and sweeps, all by default, and writes what there is."""
    for workload in TARGETS if chosen != ["draw"] else ():
        if not chosen or workload in chosen:
            measure(workload, workload, [] if workload == "bag" else [ENGINES])
    for name, (workload, key, values) in SWEEPS.items():
        if not chosen or name in chosen:
            swept = [SWEPT, f"bench.sweep={{{key}:{values}}}", "bench.repetitions=7"]
            measure(name, workload, swept)
    found = {name: figures(name) for name in TARGETS}
    measured = {name: rows for name, rows in found.items() if rows is not None}
    draw(measured)
    (RESULTS / "table.md").write_text(table(measured) + "\n", encoding="utf-8")
    print(table(measured))


if __name__ == "__main__":
    main(sys.argv[1:])
