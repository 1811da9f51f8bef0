"""`python -m dpsgd.pretrain`: trains a model on public records without privacy, to start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from dpsgd import cli, durable, metrics
from dpsgd.components import build, finished, takes
from dpsgd.config import placement
from dpsgd.data import Dataset
from dpsgd.engines import Batch
from dpsgd.evaluate import evaluate
from dpsgd.precision import with_autocast
from dpsgd.report import banner
from dpsgd.run_directory import CONFIG, MODEL, RunDirectory
from dpsgd.seeding import seed_everything

_NOT_PRIVATE = (
    "Pre-training has no privacy: its records are as good as published with its weights. Give it "
    "public ones only."
)


def pretrain(config: DictConfig, path: Path, console: Console) -> dict[str, float]:
    """Trains without privacy, saves the weights, and returns the test results.

    Args:
        config: A resolved configuration with the section `pretrain`.
        path: Where model.safetensors and config.yaml go, and hf/ of a Hugging Face model.
        console: Where the progress and the results go.

    Raises:
        ValueError: If the configuration is unsound, or the files cannot be written.
    """
    settings = config.pretrain
    if settings.num_steps < 1 or settings.batch_size < 1:
        raise ValueError(
            f"Expected pretrain.num_steps and pretrain.batch_size >= 1, got {settings.num_steps} "
            f"and {settings.batch_size}."
        )
    if (path / MODEL).exists() or (path / "private").exists():
        raise ValueError(f"Expected a new run.dir, got '{path}', where a run is. Choose another.")
    with _writing(path):  # found out before the work
        pass
    seed_everything(config.seed)
    parts = build(config, ("data", "model", "loss", "optimizer", "schedule"))
    place, data = placement(config), parts["data"]
    model = place.model(parts["model"])
    loss_fn = with_autocast(parts["loss"], config.autocast, place.dtype)
    optimizer, scheduler = _optimizer(parts, model, settings.num_steps)
    console.print(banner([_NOT_PRIVATE]))
    batches = _batches(data, settings.batch_size, settings.num_steps)
    for batch in track(batches, "pre-training", settings.num_steps, console=console):
        optimizer.zero_grad(set_to_none=True)
        loss_fn(model, place.batch(batch)).mean().backward()
        optimizer.step()
        scheduler.step()
    test = dict(evaluate(model, loss_fn, data))
    _save(path, model, config)
    name = metrics.headline(test)
    if name is not None:
        console.print(f"{name.replace('_', ' ')}: {metrics.shown(name, test[name])}")
    words = f"Start from it: python -m dpsgd.train model.init_from={path / MODEL}"
    console.print(words, soft_wrap=True, highlight=False)
    return test


def _optimizer(
    parts: dict[str, Any], model: nn.Module, num_steps: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = finished("optimizer", parts["optimizer"], torch.optim.Optimizer, weights)
    schedule = parts["schedule"]
    options = {"num_steps": num_steps} if takes(schedule, "num_steps") else {}
    return optimizer, finished("schedule", schedule, LRScheduler, optimizer, **options)


def _batches(data: Dataset, size: int, count: int) -> Iterator[Batch]:
    """Batches of records drawn at random, as many at a time as there are at most."""
    for _ in range(count):
        yield data.take(torch.randint(len(data), (min(size, len(data)),)))


def _save(path: Path, model: nn.Module, config: DictConfig) -> None:
    settings = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    with _writing(path):
        RunDirectory(path).save_model(model)
        durable.write(path / CONFIG, OmegaConf.to_yaml(settings).encode())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Makes the directory; says in words what cannot be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(
            f"Cannot write '{error.filename or path}': {error.strerror or error}. Choose another "
            "run.dir, or make room."
        ) from error


def main() -> None:
    """The command."""
    console = Console()
    cli.run(lambda config: _run(config, console), "pretrain")


def _run(config: DictConfig, console: Console) -> None:
    pretrain(config, cli.run_path(config.run.dir), console)


if __name__ == "__main__":
    main()
