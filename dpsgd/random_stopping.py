"""Choosing among a random number of runs, of which only the best is released."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dpsgd import rng
from dpsgd.accounting import Releases, random_stopping_epsilon
from dpsgd.run_directory import CONFIG, KEY, destroy_key, write_report
from dpsgd.sweeps import best_of

_MAX_RUNS = 1_000_000
_ROUNDS = 200


def candidates(config: DictConfig) -> list[DictConfig]:
    """Returns every configuration that `sweep.over` describes, in the order of its values.

    Raises:
        ValueError: If `sweep.over` is not {setting: [values]}, or names no setting.
    """
    over = config.sweep.over
    if not isinstance(over, DictConfig) or not over:
        raise ValueError(
            "Expected sweep.over={setting:[value,...]}, such as {optimizer.lr:[0.1,0.2]}, got "
            f"{over!r}."
        )
    settings = {str(key): list(values) for key, values in over.items() if _listed(key, values)}
    made = []
    for values in itertools.product(*settings.values()):
        changed = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
        assert isinstance(changed, DictConfig)
        for key, value in zip(settings, values):
            if OmegaConf.select(changed, key, default=_ABSENT) is _ABSENT:
                raise ValueError(f"There is no setting '{key}' (sweep.over).")
            OmegaConf.update(changed, key, value)
        made.append(changed)
    return made


_ABSENT = object()


def _listed(key: Any, values: Any) -> bool:
    if not OmegaConf.is_list(values) or len(values) == 0:
        raise ValueError(f"Expected a list of values for sweep.over '{key}', got {values!r}.")
    return True


def number_of_runs(mean: float, shape: float, key: bytes) -> int:
    """Returns a number of runs drawn from a truncated negative binomial distribution.

    P(K = k) is proportional to (1 - gamma)^k prod_{l<k} (l + shape) / (l + 1) for k >= 1, with the
    gamma that gives the mean; shape 0 is the logarithmic distribution (Papernot & Steinke 2022,
    arXiv:2110.03620, definition 1).

    Args:
        mean: Mean of K, > 1.
        shape: >= 0.
        key: 32 secret bytes.

    Raises:
        ValueError: If mean or shape is out of range.
    """
    if not (math.isfinite(mean) and mean > 1 and math.isfinite(shape) and shape >= 0):
        raise ValueError(f"Expected sweep.mean > 1 and sweep.shape >= 0, got {mean} and {shape}.")
    gamma = _gamma(mean, shape)
    left = float(rng.uniforms(key, 0, 1)[0])
    if shape == 0:
        probability = (1 - gamma) / math.log(1 / gamma)
    else:
        probability = shape * (1 - gamma) / (gamma**-shape - 1)
    for k in range(1, _MAX_RUNS):
        left -= probability
        if left <= 0:
            return k
        probability *= (1 - gamma) * (k + shape) / (k + 1)
    return _MAX_RUNS


def _gamma(mean: float, shape: float) -> float:
    """Solves mean = shape (1 - gamma) / (gamma (1 - gamma^shape)), which falls in gamma."""
    low, high = -700.0, -1e-12  # of log gamma
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        gamma = math.exp(middle)
        if shape == 0:
            found = (1 / gamma - 1) / -middle
        else:
            found = shape * (1 - gamma) / (gamma * -math.expm1(shape * middle))
        low, high = (middle, high) if found > mean else (low, middle)
    return math.exp((low + high) / 2)


def run_candidates(
    config: DictConfig,
    path: Path,
    releases_of: Callable[[DictConfig], Releases],
    train: Callable[[DictConfig, Path, bytes], dict[str, Any]],
    key: bytes,
) -> dict[str, Any]:
    """Trains a random number of candidates, keeps the best one in `path` and destroys the others.

    Args:
        config: A resolved configuration with `sweep.over`, `sweep.mean` and `sweep.shape`.
        path: The run's directory.
        releases_of: What a configuration releases.
        train: Trains a configuration in a directory with a key and returns its report.
        key: The sweep's key: number, choices and keys of the runs follow from it.

    Returns:
        The report of the best run with an entry `sweep`, whose epsilon is that of the choice.

    Raises:
        ValueError: If the candidates do not all spend the same, the settings make no sense, or no
            candidate has a test result to be chosen by.
    """
    choices = candidates(config)
    releases = {releases_of(choice) for choice in choices}
    if len(releases) != 1:
        raise ValueError(
            "Expected candidates that all have the same privacy plan, got several: sweep.over must "
            "not change sampling, noise or the number of steps."
        )
    sweep, privacy = config.sweep, config.privacy
    count = number_of_runs(sweep.mean, sweep.shape, rng.derive(key, "number of runs"))
    epsilon = random_stopping_epsilon(
        releases.pop(), privacy.target_delta, sweep.mean, sweep.shape, privacy.adjacency
    )
    if (path / CONFIG).exists():
        raise ValueError(f"Expected a new run directory, but '{path}' holds a run.")
    drawer = path / "private" / "candidates"
    if drawer.exists():
        for secret in drawer.glob(f"*/private/{KEY}"):
            destroy_key(secret)
        raise ValueError(
            f"Expected a new run directory, but '{path}' holds a sweep that was interrupted. How "
            "many runs it had is secret, so it cannot go on: choose another run.dir, count this "
            "sweep's whole epsilon as spent, and remove the directory."
        )
    picks = rng.uniforms(rng.derive(key, "choices"), 0, count).mul(len(choices)).ceil().long() - 1
    reports = []
    for number, pick in enumerate(picks.tolist()):
        drawer.mkdir(parents=True, exist_ok=True)
        (path / "private").chmod(0o700)
        run_key = rng.derive(key, "run", number)
        try:
            reports.append(train(choices[pick], drawer / str(number), run_key))
        finally:
            destroy_key(drawer / str(number) / "private" / KEY)  # if it was interrupted
    best = best_of(reports)
    if best is None:
        raise ValueError(
            "Expected a public test set to choose the best run by, got no test results. Give one, "
            "or use sweep=grid."
        )
    entry = {
        "epsilon": epsilon,
        "delta": privacy.target_delta,
        "mean_runs": sweep.mean,
        "accounting": "random stopping, RDP (Papernot & Steinke 2022)",
    }
    report = {**reports[best], "sweep": entry}
    _release(drawer / str(best), path, report)
    return report


def _release(winner: Path, path: Path, report: Mapping[str, Any]) -> None:
    """Moves the winner's files to the run's directory and destroys every candidate."""
    drawer = winner.parent
    for file in winner.iterdir():
        if file.name != "private":
            shutil.move(file, path / file.name)
    for secret in (winner / "private").iterdir():
        if secret.name != KEY:
            shutil.move(secret, path / "private" / secret.name)
    shutil.rmtree(drawer)
    write_report(path, report, (path / CONFIG).read_text(encoding="utf-8"))
