"""What each recipe gives on digits at epsilon 1, 3 and 8: `python experiments/recipes/run.py`.

Writes runs.csv (a line per run), results.json and recipes.png beside this file. Some ten minutes on
two free cores; a second call does only what is missing, `--again` all of it.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import ROOT, Job, at, finish, settings, start, summarised
from plots import plot, table

from dpsgd.components import build
from dpsgd.evaluate import evaluate
from dpsgd.pretrain import pretrain
from dpsgd.saved_run import load_weights

HERE = Path(__file__).parent
RUNS, RESULTS = HERE / "runs.csv", HERE / "results.json"
EPSILONS, SMALL = (1, 3, 8), 0.3
SEEDS = (0, 1, 2, 3, 4)
GRID = {"epsilons": (1, 8), "seeds": (5,), "rates": (1.1, 2.2, 4.4), "extensions": 3}
PUBLIC = "build/recipes"
AFFINE = ("augmentation=affine", "augmentation.multiplicity=4")
TEMPERED = "model.activation={scale:1.58,inverse_temperature:3.0,offset:0.71}"
FILTERS, AVERAGE, COSINE = "model=filters", "trainer.ema_decay=0.9", "schedule=cosine"
FROM = f"model.init_from={PUBLIC}/cnn/model.safetensors"
FROM_FILTERS = f"model.init_from={PUBLIC}/filters/model.safetensors"
RECIPES: dict[str, Job] = {
    "baseline": (),
    "ReLU instead of tanh": ("model.activation=relu",),
    "tempered sigmoid": (TEMPERED,),
    "group normalisation": ("model.groups=4",),
    "group norm. + standardised weights": ("model.groups=4", "model.weight_standardisation=true"),
    "unit-norm clipping, C = 0.1": ("clipping=unit_norm", "clipping.max_grad_norm=0.1"),
    "average of weights, 0.9": (AVERAGE,),
    "average of weights, 0.95": ("trainer.ema_decay=0.95",),
    "cosine schedule": (COSINE,),
    "linear schedule": ("schedule=linear",),
    "quarter batches, 240 steps": ("sampler.sample_rate=0.25", "trainer.num_steps=240"),
    "quarter, then full batches": ("sampler.schedule={0:0.25,48:1.0}", "trainer.num_steps=96"),
    "4 views (affine)": AFFINE,
    "filters": (FILTERS,),
    "filters + views + average + cosine": (FILTERS, *AFFINE, AVERAGE, COSINE),
    "pre-trained": (FROM,),
    "pre-trained, head alone": (FROM, "model.trainable='head.*'"),
    "pre-trained, biases alone": (FROM, "model.trainable='*bias'"),
    "pre-trained filters": (FILTERS, FROM_FILTERS),
    "pre-trained filters + average + cosine": (FILTERS, FROM_FILTERS, AVERAGE, COSINE),
}
DEFAULT_RATE = 2.2
AS_DEFAULT = ("baseline", "4 views (affine)")
RATE_OF = {  # to save time
    "average of weights, 0.95": "average of weights, 0.9",
    "linear schedule": "cosine schedule",
}
AT_SMALL = ("baseline", "filters", "pre-trained", "pre-trained, head alone", "pre-trained filters")
CROPS = (
    "augmentation=crop_flip",
    "augmentation.multiplicity=4",
    "augmentation.padding=1",
    "augmentation.flip=false",
)


def public_models() -> dict[str, float]:
    """Pre-trains on printed digits unless that is done; returns accuracies on handwritten ones."""
    found = {}
    for model in ("cnn", "filters"):
        folder = ROOT / PUBLIC / model
        if not (folder / "model.safetensors").exists():
            config = settings([f"model={model}", "device=cpu"], "pretrain")
            pretrain(config, folder, Console(quiet=True))
        parts = build(settings([f"model={model}", "device=cpu"]), ("data", "model", "loss"))
        load_weights(parts["model"], folder / "model.safetensors")
        found[model] = evaluate(parts["model"], parts["loss"], parts["data"])["test_accuracy"]
    return found


def chosen_rates() -> dict[str, dict[str, Any]]:
    """Returns the best rate of each recipe on a grid that grows while the best is at its edge."""
    searched = [name for name in RECIPES if name not in (*RATE_OF, *AS_DEFAULT)]
    grids = {name: sorted(GRID["rates"]) for name in searched}
    for extension in range(GRID["extensions"] + 1):
        cells = {
            (name, rate): [
                (*RECIPES[name], *at(epsilon, rate, seed))
                for epsilon in GRID["epsilons"]
                for seed in GRID["seeds"]
            ]
            for name, rates in grids.items()
            for rate in rates
        }
        rows = finish((j for jobs in cells.values() for j in jobs), RUNS, "learning rates")
        means: dict[str, dict[float, float]] = {name: {} for name in grids}
        for (name, rate), jobs in cells.items():
            means[name][rate] = statistics.mean(rows[job]["test_accuracy"] for job in jobs)
        best = {name: max(found, key=lambda rate: found[rate]) for name, found in means.items()}
        if extension == GRID["extensions"]:
            break
        for name, rates in grids.items():
            if best[name] == rates[0]:
                rates.insert(0, rates[0] / 2)
            elif best[name] == rates[-1]:
                rates.append(rates[-1] * 2)
    shown = {n: {f"{r:g}": round(m, 4) for r, m in sorted(means[n].items())} for n in grids}
    found = {name: {"rate": best[name], "grid": shown[name]} for name in grids}
    found |= {name: {"rate": DEFAULT_RATE} for name in AS_DEFAULT}
    return {name: found[RATE_OF.get(name, name)] for name in RECIPES}


def study() -> dict[str, Any]:
    """Returns mean and spread for every recipe and budget."""
    public = public_models()
    rates = chosen_rates()
    cells = {}
    for name, recipe in RECIPES.items():
        for epsilon in (SMALL, *EPSILONS) if name in AT_SMALL else EPSILONS:
            rate = rates[name]["rate"]
            cells[name, epsilon] = [(*recipe, *at(epsilon, rate, seed)) for seed in SEEDS]
    crops = [(*CROPS, *at(3, DEFAULT_RATE, seed)) for seed in SEEDS]
    jobs = [job for found in cells.values() for job in found] + crops
    rows = finish(sorted(jobs, key=lambda job: job[-1]), RUNS, "recipes")  # seed by seed
    results: dict[str, Any] = {"public models on digits": public, "recipes": {}}
    for name, recipe in RECIPES.items():
        results["recipes"][name] = {
            "settings": " ".join(recipe),
            **rates[name],
            "accuracy": {
                f"{epsilon:g}": summarised(rows[job] for job in found)
                for (cell, epsilon), found in cells.items()
                if cell == name
            },
        }
    results["crops at epsilon 3"] = summarised(rows[job] for job in crops)
    return results


def main() -> None:
    """Runs the study, writes its figures and prints them."""
    start((RUNS,), __doc__)
    results = study()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(results, HERE)
    print(table(results))


if __name__ == "__main__":
    main()
