"""What choosing the best of several runs costs: `python experiments/tuning/run.py`.

Writes costs.json (from the accountant alone), runs.csv (a line per run), results.json and
tuning.png beside this file. Some five minutes on two free cores; a second call does only the runs
that are missing, `--again` all of it.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import DELTA, Job, Row, finish, new_figure, noise_multiplier, start

from dpsgd import rng
from dpsgd.accounting import epsilon, random_stopping_epsilon
from dpsgd.accounting.releases import gaussian_releases
from dpsgd.random_stopping import number_of_runs

HERE = Path(__file__).parent
RUNS, COSTS = HERE / "runs.csv", HERE / "costs.json"
STEPS, EPSILON_OF_A_RUN, TOTAL = 60, 1.0, 3.0
COUNTS = (1, 2, 3, 5, 10, 20, 50, 100)
SHAPES = {"random stopping, logarithmic": 0.0, "random stopping, geometric": 1.0}
RATES = (0.55, 2.2, 8.8)  # over the noise multiplier
MEAN, SHAPE = 3.0, 0.0
REPETITIONS = range(5)


def spent(way: str, count: int, sigma: float) -> float:
    """Returns the epsilon of choosing among `count` runs (on average, with random stopping)."""
    if way == "not charged":
        return epsilon(sample_rate=1.0, noise_multiplier=sigma, num_steps=STEPS, delta=DELTA)
    if way == "composition":
        steps = STEPS * count
        return epsilon(sample_rate=1.0, noise_multiplier=sigma, num_steps=steps, delta=DELTA)
    releases = gaussian_releases([(sigma, STEPS)])
    return random_stopping_epsilon(releases, DELTA, float(count), SHAPES[way])


@cache
def needed(way: str, count: int) -> float:
    """Returns the noise multiplier of a run with which the whole choice spends TOTAL."""
    low, high = 1.0, 1000.0
    while high / low > 1.0005:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if spent(way, count, middle) <= TOTAL else (middle, high)
    return high


def costs() -> dict[str, Any]:
    """Returns what the accountant says of every way and number of runs."""
    sigma = noise_multiplier(EPSILON_OF_A_RUN)
    found: dict[str, Any] = {"noise multiplier of a run": sigma, "ways": {}}
    for way in ("not charged", "composition", *SHAPES):
        counts = [count for count in COUNTS if count > 1 or way not in SHAPES]
        found["ways"][way] = {
            str(count): {
                "epsilon": round(spent(way, count, sigma), 4),
                "noise_multiplier_for_3": round(needed(way, count), 3),
            }
            for count in counts
        }
    return found


def job(sigma: float, rate: float, seed: int) -> Job:
    """Returns the settings of a run."""
    noise = f"privacy.noise_multiplier={sigma:.4f}"
    return noise, f"optimizer.lr={rate / sigma:.4g}", f"seed={seed}"


def drawn(repetition: int) -> list[float]:
    """Returns the rates of the runs of one random stopping.

    The keys are fixed so that a second call finds its runs again; those of a choice are secret.
    """
    key = rng.derive(bytes(32), "tuning study", repetition)
    count = number_of_runs(MEAN, SHAPE, rng.derive(key, "number of runs"))
    picks = rng.uniforms(rng.derive(key, "choices"), 0, count).mul(len(RATES)).ceil().long() - 1
    return [RATES[pick] for pick in picks.tolist()]


def sweeps(found: dict[str, Any]) -> dict[str, list[list[Job]]]:
    """Returns the jobs of each way of choosing: a list per repetition, of which the best counts."""
    ways = found["ways"]
    alone = ways["not charged"]["1"]["noise_multiplier_for_3"]
    third = ways["composition"][str(len(RATES))]["noise_multiplier_for_3"]
    stopped = ways["random stopping, logarithmic"][f"{MEAN:g}"]["noise_multiplier_for_3"]
    one = {
        f"one run, rate {rate:g}": [[job(alone, rate, r)] for r in REPETITIONS] for rate in RATES
    }
    grid = [[job(third, rate, 10 + r) for rate in RATES] for r in REPETITIONS]
    best = [
        [job(stopped, rate, 100 + 100 * r + i) for i, rate in enumerate(drawn(r))]
        for r in REPETITIONS
    ]
    untold = [[job(alone, rate, r) for rate in RATES] for r in REPETITIONS]  # the runs above
    return {
        **one,
        "best of three, not charged": untold,
        "best of three, composition": grid,
        "random stopping": best,
    }


def study(found: dict[str, Any]) -> dict[str, Any]:
    """Returns the accuracies of each way at a total epsilon of 3."""
    chosen = sweeps(found)
    jobs = [job for tries in chosen.values() for found in tries for job in found]
    rows = finish(jobs, RUNS, "tuning")
    return {way: _row(tries, rows) for way, tries in chosen.items()}


def _row(tries: list[list[Job]], rows: dict[Job, Row]) -> dict[str, Any]:
    best = [max(rows[job]["test_accuracy"] for job in jobs) for jobs in tries]
    return {
        "test_accuracy": [round(value, 4) for value in best],
        "mean": round(statistics.mean(best), 4),
        "standard_deviation": round(statistics.stdev(best), 4),
        "runs": [len(jobs) for jobs in tries],
        "noise_multiplier": rows[tries[0][0]]["noise_multiplier"],
    }


def draw_costs(axes: Axes, found: dict[str, Any], figure: str) -> None:
    """Draws one figure of the ways against the number of runs."""
    styles = itertools.cycle(("k--", "C3o-", "C0s-", "C2^-"))
    for (way, rows), style in zip(found["ways"].items(), styles):
        counts = [int(count) for count in rows]
        axes.plot(counts, [row[figure] for row in rows.values()], style, markersize=4, label=way)
    axes.set_xscale("log")
    axes.set_xticks((1, 3, 10, 30, 100), ("1", "3", "10", "30", "100"))
    axes.set_xlabel("runs to choose from (mean number, if random)")
    axes.grid(alpha=0.3)


def plot(found: dict[str, Any], results: dict[str, Any]) -> None:
    """Draws the costs and the accuracies."""
    figure = new_figure(12, 3.9)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
    draw_costs(left, found, "epsilon")
    left.set_ylabel("epsilon of the choice (delta 1e-5)")
    left.set_title("Every run alone spends epsilon 1", fontsize=10)
    left.legend(fontsize=8)
    draw_costs(middle, found, "noise_multiplier_for_3")
    middle.set_ylabel("noise multiplier of each run")
    middle.set_title("Noise for epsilon 3 in all", fontsize=10)
    for number, (way, row) in enumerate(results.items()):
        color = "0.5" if way == "best of three, not charged" else "C0"
        mean, spread = 100 * row["mean"], 100 * row["standard_deviation"]
        right.errorbar([mean], [number], xerr=[spread], fmt="o", capsize=3, color=color)
    right.set_yticks(range(len(results)), [way.replace(", ", ",\n") for way in results], fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("test accuracy (%)")
    right.set_title("Digits, epsilon 3 in all (but the grey)", fontsize=10)
    right.grid(alpha=0.3)
    figure.savefig(HERE / "tuning.png", dpi=150)


def main() -> None:
    """Runs the study, writes its figures and prints them."""
    start((RUNS, COSTS), __doc__)
    if not COSTS.exists():
        COSTS.write_text(json.dumps(costs(), indent=2) + "\n", encoding="utf-8")
    found = json.loads(COSTS.read_text(encoding="utf-8"))
    results = study(found)
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(found, results)
    for way, rows in found["ways"].items():
        print(f"{way}: {', '.join(f'{count}: {row}' for count, row in rows.items())}")
    for way, row in results.items():
        print(f"{way}: {row['mean']:.1%} +- {row['standard_deviation']:.1%}, runs {row['runs']}")


if __name__ == "__main__":
    main()
