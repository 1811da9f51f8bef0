"""Finds mislabelled digits by their gradients: `python experiments/mislabelled/run.py`.

Gives 3 % of the training labels another value, trains a small model on all of them without privacy,
and ranks the records by what per-sample gradients say at five checkpoints. Writes results.json and
mislabelled.png beside this file. About a quarter of a minute on one core.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn

from dpsgd.data import digits
from dpsgd.engines import Ghost
from dpsgd.losses import cross_entropy

HERE = Path(__file__).parent
SEEDS = (0, 1, 2, 3, 4)
SHARE = 0.03
EPOCHS, CHECKPOINT_EVERY = 20, 4
SHOWN = 24


def flipped(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Returns labels of which some have another value, and which those are, [N] each."""
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=random)[: round(SHARE * len(labels))]
    given = labels.clone()
    given[chosen] += torch.randint(1, 10, (len(chosen),), generator=random)
    given %= 10
    return given, given != labels


def scores(x: Tensor, y: Tensor, trusted: tuple[Tensor, Tensor], seed: int) -> dict[str, Tensor]:
    """Returns scores [N] that are high where a label is suspicious, added up over checkpoints."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(576, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )
    engine = Ghost(model, cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = "gradient norm", "self-influence", "harm to trusted records", "loss"
    found = {name: torch.zeros(len(x)) for name in names}
    for epoch in range(1, EPOCHS + 1):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            cross_entropy(model, (x[rows], y[rows])).mean().backward()
            optimizer.step()
        if epoch % CHECKPOINT_EVERY == 0:
            trusted_gradient = engine(trusted).weighted_sum(torch.ones(len(trusted[1])))
            grads = engine((x, y))
            norms = grads.norms()[:, 0]
            found["gradient norm"] += norms
            found["self-influence"] += norms.square()
            found["harm to trusted records"] -= grads.dot(trusted_gradient)
            found["loss"] += grads.losses
    return found


def quality(score: Tensor, wrong: Tensor) -> dict[str, float]:
    """Returns how well a score tells the wrong labels from the right ones."""
    first = score.argsort(descending=True)[: int(wrong.sum())]
    return {
        "auc": float(roc_auc_score(wrong, score)),
        "average_precision": float(average_precision_score(wrong, score)),
        "precision_at_planted": float(wrong[first].float().mean()),
    }


def main() -> None:
    """Runs the study, writes its figures and prints them."""
    data = digits()
    (x, labels), trusted = data.train, data.test
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        given, wrong = flipped(labels, seed)
        found = scores(x, given, trusted, seed)
        for name, score in found.items():
            runs.setdefault(name, []).append(quality(score, wrong))
        if seed == SEEDS[0]:
            plot(x, labels, given, found["self-influence"])
    results = {
        name: {
            key: {
                "mean": statistics.mean(row[key] for row in rows),
                "standard_deviation": statistics.stdev(row[key] for row in rows),
            }
            for key in rows[0]
        }
        for name, rows in runs.items()
    }
    about = {"planted": round(SHARE * len(labels)), "records": len(labels), "seeds": list(SEEDS)}
    text = json.dumps({**about, "scores": results}, indent=2) + "\n"
    (HERE / "results.json").write_text(text, encoding="utf-8")
    for name, row in results.items():
        words = (
            f"{key} {v['mean']:.3f} +- {v['standard_deviation']:.3f}" for key, v in row.items()
        )
        print(f"{name}: {', '.join(words)}")


def plot(x: Tensor, labels: Tensor, given: Tensor, score: Tensor) -> None:
    """Draws the records with the highest scores, with the label that they have and had."""
    order = score.argsort(descending=True)[:SHOWN].tolist()
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    planted = int((given != labels)[order].sum())
    figure.suptitle(
        f"The {SHOWN} most suspicious of {len(x)} digits by self-influence, the most first: "
        f"{planted} have a label that was changed (red)",
        fontsize=11,
    )
    for place, i in enumerate(order):
        axes = figure.add_subplot(3, SHOWN // 3, place + 1)
        axes.imshow(x[i, 0], cmap="gray_r", interpolation="nearest", vmin=0, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
        changed = bool(given[i] != labels[i])
        colour = "tab:red" if changed else "dimgray"
        axes.set_title(f"labelled {int(given[i])}", fontsize=9, color=colour)
        axes.set_xlabel(f"was {int(labels[i])}" if changed else "label not changed", fontsize=8)
        for spine in axes.spines.values():
            spine.set_color(colour)
            spine.set_linewidth(1.6)
    figure.savefig(HERE / "mislabelled.png", dpi=150)


if __name__ == "__main__":
    main()
