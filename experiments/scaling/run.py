"""What a private step costs on 1 to 4 processes, beside what the model in docs/scaling.md says.

    python experiments/scaling/run.py        # some minutes; writes results.json and scaling.png

Each world size is a job of its own, started as torchrun starts it. In each, private and ordinary
steps of the same model on the same batch take turns.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpsgd
from dpsgd import parallel
from dpsgd.clipping import Flat
from dpsgd.engines import Ghost
from dpsgd.models import Transformer
from dpsgd.noise import Gaussian

HERE = Path(__file__).parent
WORLDS = 1, 2, 4
WAYS = "ddp", "fsdp"
SIZES = {  # width, depth, tokens per sample
    "small": (128, 2, 64),
    "wide": (256, 4, 64),
    "long": (128, 2, 256),
}
BATCH, VOCABULARY, STEPS = 16, 256, 7
BYTES = 4


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of each sample."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def model_of(size: str) -> nn.Module:
    """An encoder of blocks as GPT-2 has them."""
    width, depth, length = SIZES[size]
    torch.manual_seed(0)
    return Transformer((length,), 10, VOCABULARY, width=width, depth=depth, heads=4)


def worker(way: str, size: str) -> dict[str, Any]:
    """One process of a job: its median seconds, private and not, and where they go."""
    with parallel.joined() as world:
        torch.set_num_threads(1)
        made = parallel.single() if world.size == 1 else getattr(parallel, way)()
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(VOCABULARY, (BATCH, SIZES[size][2]), generator=generator)
        batch = tuple(
            t[world.rank :: world.size] for t in (x, torch.zeros(BATCH, dtype=torch.long))
        )
        engine = Ghost(model_of(size), loss_fn)
        made.place(engine)
        parameters = list(engine.parameters.values())
        optimizer = torch.optim.Adam(parameters, lr=1e-4)
        step = dpsgd.PrivateStep(
            engine, optimizer, clipping=Flat(1.0), noise=Gaussian(bytes(32)), noise_multiplier=1.0,
            expected_batch_size=BATCH, parallel=made,
        )  # fmt: skip
        phases: dict[str, list[float]] = {"accumulate": [], "release": [], "ordinary": []}

        def ordinary() -> None:
            loss_fn(engine.model, batch).mean().backward()
            if way == "ddp":
                for p in parameters:
                    world.sum_(p.grad)
            optimizer.step()
            optimizer.zero_grad()

        def timed(phase: str, function: Callable[[], object]) -> None:
            start = time.perf_counter()
            function()
            phases[phase].append(time.perf_counter() - start)

        for _ in range(STEPS):
            timed("accumulate", lambda: step.accumulate(batch))
            timed("release", step.release)
            timed("ordinary", ordinary)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        medians = {name: statistics.median(seconds[2:]) for name, seconds in phases.items()}
        return {
            "parameters": sum(p.numel() for p in parameters),
            "peak_bytes": peak,
            "bytes_per_second": _bandwidth(world),
            "noise_per_second": _noise_rate(),
            **medians,
        }


def _bandwidth(world: parallel.World) -> float | None:
    """Bytes that an all-reduce of 8 MB moves per second and process; None for one alone."""
    if world.size == 1:
        return None
    block = torch.zeros(1 << 21)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        world.sum_(block)
        times.append(time.perf_counter() - start)
    return 2 * (world.size - 1) / world.size * block.nbytes / statistics.median(times)


def _noise_rate() -> float:
    sums, noise = {"x": torch.zeros(1 << 20)}, Gaussian(bytes(32))
    times = []
    for number in range(4):
        start = time.perf_counter()
        noise.add_(sums, 1.0, number)
        times.append(time.perf_counter() - start)
    return sums["x"].numel() / min(times)


def measured(way: str, size: str, processes: int) -> dict[str, Any]:
    """The slowest process's figures of a job."""
    port = str(29500 + (len(size) * 31 + len(way) * 7 + processes))
    jobs = []
    for rank in range(processes):
        variables = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port,
            "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        jobs.append(
            subprocess.Popen(
                [sys.executable, __file__, way, size],
                env={**os.environ, **{k: str(v) for k, v in variables.items()}},
                stdout=subprocess.PIPE,
            )
        )
    found = [json.loads(job.communicate()[0].splitlines()[-1]) for job in jobs]
    return max(found, key=lambda one: one["accumulate"] + one["release"])


def predicted(row: dict[str, Any], alone: dict[str, Any], cores: int) -> float:
    """Seconds of a private step by the model of docs/scaling.md.

    Computing scales with the samples per process and the cores per process; the sums (ddp: one
    all-reduce; fsdp: two gathers and a reduce-scatter) with the parameters, not with the processes;
    the noise is drawn by all (ddp) or shared out (fsdp).
    """
    processes, way, count = row["processes"], row["way"], row["parameters_in_all"]
    crowded = max(1.0, processes / cores)
    optimizer = alone["release"] - count / alone["noise_per_second"]
    seconds = alone["accumulate"] / processes * crowded
    if processes == 1:
        return seconds + alone["release"]
    moved = (2 if way == "ddp" else 3) * (processes - 1) / processes * count * BYTES
    noise, held = (count, 1) if way == "ddp" else (count / processes, processes)
    seconds += moved / row["bytes_per_second"]
    return seconds + (noise / alone["noise_per_second"] + optimizer / held) * crowded


def main() -> None:
    """Measures everything and writes it down."""
    from rich.progress import track

    cores = os.cpu_count() or 1
    rows: list[dict[str, Any]] = []
    jobs = [(s, w, p) for s in SIZES for p in WORLDS for w in (WAYS if p > 1 else ("ddp",))]
    for size, way, processes in track(jobs, description="measuring jobs"):
        row = {"size": size, "way": way, "processes": processes, **measured(way, size, processes)}
        alone = next((r for r in rows if r["size"] == size and r["processes"] == 1), row)
        row["parameters_in_all"] = alone["parameters"]
        row["private"] = row["accumulate"] + row["release"]
        row["predicted"] = predicted(row, alone, cores)
        rows.append(row)
    machine = {"cores": cores, "torch": torch.__version__, "threads_per_process": 1}
    text = json.dumps({"machine": machine, "batch": BATCH, "rows": rows}, indent=1)
    (HERE / "results.json").write_text(text + "\n")
    draw(rows)
    for row in rows:
        print(
            f"{row['size']:6} {row['way']:5} {row['processes']} processes: "
            f"{1e3 * row['private']:7.1f} ms, predicted {1e3 * row['predicted']:7.1f}, "
            f"ordinary {1e3 * row['ordinary']:7.1f}"
        )


def draw(rows: list[dict[str, Any]]) -> None:
    """Measured and predicted seconds against the number of processes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SIZES), figsize=(11, 3.4), layout="constrained")
    for axis, size in zip(axes, SIZES, strict=True):
        for way, colour in zip(WAYS, ("tab:blue", "tab:orange"), strict=True):
            own = [
                r for r in rows if r["size"] == size and (r["way"] == way or r["processes"] == 1)
            ]
            worlds = [r["processes"] for r in own]
            for key, style in (("private", "o-"), ("predicted", "x--"), ("ordinary", ".:")):
                label = f"{way}, {key}"
                axis.plot(worlds, [1e3 * r[key] for r in own], style, color=colour, label=label)
        width, depth, length = SIZES[size]
        axis.set_title(f"width {width}, depth {depth}, {length} tokens", fontsize=9)
        axis.set_xticks(WORLDS)
        axis.set_xlabel("processes")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("milliseconds per step")
    axes[-1].legend(fontsize=7)
    figure.savefig(HERE / "scaling.png", dpi=120)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(worker(*sys.argv[1:])))
    else:
        main()
