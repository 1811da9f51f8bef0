"""Perplexity of private fine-tuning against epsilon: `python experiments/lm/run.py`.

Pre-trains a small GPT-2 on public stories without privacy, fine-tunes it on private ones, whole and
with LoRA, at epsilon 1, 3 and 8 over three seeds, and writes results.json and perplexity.png beside
this file. Some ten minutes on two cores.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from dpsgd.components import build
from dpsgd.config import config_dir, resolve
from dpsgd.data import Dataset
from dpsgd.data.stories import entropy
from dpsgd.evaluate import evaluate
from dpsgd.losses import causal_lm
from dpsgd.seeding import seed_everything
from dpsgd.train import train

HERE = Path(__file__).parent
EPSILONS = (1, 3, 8)
SEEDS = (0, 1, 2)
RATES = {  # by hand: of DP at each epsilon, and without privacy
    "lora": {1: 0.006, 3: 0.01, 8: 0.015, None: 0.02},
    "full": {1: 0.007, 3: 0.01, 8: 0.012, None: 0.01},
}
PRETRAINING = {"steps": 800, "batch_size": 128, "rate": 0.004}
PUBLIC = ("data.dialect=public", "data.public_size=20000")


def settings(method: str, *overrides: str) -> DictConfig:
    """Returns the configuration of `experiment=lm_METHOD` with overrides."""
    typed = [f"experiment=lm_{method}", "device=cpu", *overrides]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return resolve(compose("train", overrides=typed), typed)


def plainly(model: Any, data: Dataset, steps: int, batch_size: int, rate: float) -> Iterator[int]:
    """Trains without privacy: Adam, its rate falling to zero; yields after each step."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        batch = data.take(torch.randint(len(data), (batch_size,)))
        optimizer.zero_grad()
        causal_lm(model, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        yield step


def pretrain(folder: Path, progress: Progress) -> dict[str, float]:
    """Saves a model of the public dialect; returns its perplexity on both."""
    seed_everything(0)
    parts = build(settings("full", *PUBLIC), ("data", "model"))
    model, data = parts["model"], parts["data"]
    task = progress.add_task("pre-training on public stories", total=PRETRAINING["steps"])
    for _ in plainly(model, data, *PRETRAINING.values()):
        progress.advance(task)
    model.save_pretrained(folder)
    private = build(settings("full"), ("data",))["data"]
    return {
        "public": evaluate(model, causal_lm, data)["test_perplexity"],
        "private": evaluate(model, causal_lm, private)["test_perplexity"],
    }


def without_privacy(method: str, seed: int, base: Path) -> dict[str, float]:
    """Returns the result of as many steps without clipping each record and without noise."""
    config = settings(method, f"model.path={base}")
    seed_everything(seed)
    parts = build(config, ("data", "model"))
    size, steps = int(config.sampler.expected_batch_size), config.trainer.num_steps
    for _ in plainly(parts["model"], parts["data"], steps, size, RATES[method][None]):
        pass
    return dict(evaluate(parts["model"], causal_lm, parts["data"]))


def privately(method: str, epsilon: int, seed: int, base: Path) -> dict[str, float]:
    """Returns the result of a run of `dpsgd.train`."""
    rate = f"optimizer.lr={RATES[method][epsilon]}"
    budget = f"privacy.target_epsilon={epsilon}"
    config = settings(method, f"model.path={base}", budget, rate, f"seed={seed}")
    with tempfile.TemporaryDirectory() as folder:
        report = train(config, Path(folder, "run"), Console(quiet=True))
    return {**report["test"], "epsilon": report["epsilon"]}


def one(job: tuple[str, int | None, int], base: Path) -> dict[str, float]:
    """Returns the result of a method, an epsilon or None for no privacy, and a seed."""
    torch.set_num_threads(1)
    method, epsilon, seed = job
    if epsilon is None:
        return without_privacy(method, seed, base)
    return privately(method, epsilon, seed, base)


def summarised(found: list[dict[str, float]]) -> dict[str, Any]:
    """Returns mean and spread of the perplexities of some seeds."""
    values = [row["test_perplexity"] for row in found]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"perplexity": values, "mean": statistics.mean(values), "standard_deviation": spread}


def study(folder: Path, progress: Progress) -> dict[str, Any]:
    """Returns the figures of all runs, two of them at a time, each on one core."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {"pretrained": pretrain(folder, progress)}
    results["grammar"] = {d: math.exp(entropy(d)) for d in ("public", "private")}
    jobs = list(itertools.product(RATES, (*EPSILONS, None), SEEDS))
    task = progress.add_task("fine-tuning on private stories", total=len(jobs))
    found = {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(one, job, folder): job for job in jobs}
        for done in as_completed(waiting):
            found[waiting[done]] = done.result()
            progress.advance(task)
    for method in RATES:
        rows = {e: [found[method, e, seed] for seed in SEEDS] for e in (*EPSILONS, None)}
        spent = {e: max(row["epsilon"] for row in rows[e]) for e in EPSILONS}
        results[method] = {
            "private": {
                str(e): {**summarised(rows[e]), "epsilon_spent": spent[e]} for e in EPSILONS
            },
            "not_private": summarised(rows[None]),
        }
    return results


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws perplexity against epsilon, and lines for what bounds it; the axis has a gap."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, 6])
    names = {"lora": ("LoRA", "C0", "o"), "full": ("all weights", "C1", "s")}
    for method, (name, color, marker) in names.items():
        rows = [results[method]["private"][str(epsilon)] for epsilon in EPSILONS]
        means, spreads = ([row[k] for row in rows] for k in ("mean", "standard_deviation"))
        axes.errorbar(EPSILONS, means, spreads, color=color, marker=marker, capsize=4, label=name)
        plain = results[method]["not_private"]["mean"]
        dashes = (0 if method == "lora" else 5, (5, 5))  # both are seen where they coincide
        label = f"{name}, not private: {plain:.2f}"
        axes.axhline(plain, color=color, linestyle=dashes, label=label)
    start, least = results["pretrained"]["private"], results["grammar"]["private"]
    above.axhline(start, color="0.5", linestyle=":", label=f"no fine-tuning: {start:.1f}")
    above.set_ylim(start - 2, start + 2)
    above.legend(fontsize=8, loc="center right")
    axes.axhline(least, color="k", linewidth=1, label=f"the grammar's own entropy: {least:.2f}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(EPSILONS, [str(e) for e in EPSILONS])
    axes.set_xlabel("epsilon (delta 1e-5, add/remove)")
    axes.set_ylabel("test perplexity")
    above.set_title("Fine-tuning on private stories, mean of three seeds", fontsize=10)
    above.spines.bottom.set_visible(False)
    axes.spines.top.set_visible(False)
    above.tick_params(bottom=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Runs the study, writes its figures and prints them."""
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns) as progress:
        results = study(Path(folder), progress)
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(results, HERE / "perplexity.png")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
