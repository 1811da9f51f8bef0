"""A run's directory: what may be published, and a locked drawer for what may not."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from dpsgd import rng
from dpsgd.ledger import Charged, Ledger, read

MODEL = "model.safetensors"
CONFIG = "config.yaml"
REPORT = "report.json"
PAGE = "report.html"
METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
LEDGER_KEY = "ledger_key"
KEY = "key"


class Run(NamedTuple):
    """A finished run, read back.

    Attributes:
        model: The trained model, in eval mode on the CPU, in the dtype of the run.
        config: The composed configuration, an OmegaConf dictionary.
        report: The final figures and the guarantee, a plain dictionary.
    """

    model: nn.Module
    config: Any
    report: dict[str, Any]


class RunDirectory:
    """Creates and fills `runs/<name>/`.

    Public: config.yaml, metrics.jsonl, ledger.jsonl, tensorboard/, model.safetensors, report.json
    and report.html.
    Private, mode 0700: private/, with the key (0600) until the run ends, the ledger's own key, and
    diagnostics if they were asked for.

    Raises:
        ValueError: If the directory holds a run already, or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.private = self.path / "private"
        if (self.path / CONFIG).exists():
            raise ValueError(
                f"Expected a new run directory, but '{self.path}' holds a run. Choose another "
                "run.dir, or remove it."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.private.mkdir(mode=0o700, exist_ok=True)
            self.private.chmod(0o700)
        except OSError as error:
            raise ValueError(
                f"Expected a directory that can be written, got '{self.path}': {error.strerror}."
            ) from error

    def keep_key(self, key: bytes) -> None:
        """Stores the run's key where only its owner can read it."""
        _write_secret(self._key, key)

    def ledger(self, key: bytes, plan: Mapping[str, Any]) -> Ledger:
        """Returns a new ledger.jsonl, its own key kept in private/: it reveals no noise."""
        derived = rng.derive(key, "ledger")
        _write_secret(self.private / LEDGER_KEY, derived)
        return Ledger(self.path / LEDGER, derived, plan)

    def destroy_key(self) -> None:
        """Overwrites and removes the key: without it, nobody can subtract the noise."""
        if self._key.exists():
            with self._key.open("r+b") as file:
                file.write(b"\0" * self._key.stat().st_size)
                file.flush()
                os.fsync(file.fileno())
            self._key.unlink()

    def save_config(self, text: str) -> None:
        """Writes config.yaml."""
        (self.path / CONFIG).write_text(text, encoding="utf-8")

    def save_model(self, model: nn.Module) -> None:
        """Writes model.safetensors, tied parameters once."""
        from safetensors.torch import save_model

        save_model(model, str(self.path / MODEL))
        (self.path / MODEL).chmod((self.path / CONFIG).stat().st_mode & 0o666)

    @property
    def _key(self) -> Path:
        return self.private / KEY


def write_report(path: Path, report: Mapping[str, Any], config: str) -> None:
    """Writes report.json and report.html of a run.

    Args:
        path: The run's directory.
        report: The final report.
        config: The resolved configuration as YAML, without a key.
    """
    from dpsgd.report_html import html_report

    (path / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (path / PAGE).write_text(html_report(report, config), encoding="utf-8")


def charged(path: str | Path) -> Charged:
    """Returns what the ledger of a run directory says, verified if its key is still there.

    Raises:
        ValueError: If there is no ledger, or it is damaged or was edited.
    """
    folder = Path(path).expanduser()
    secret = folder / "private" / LEDGER_KEY
    try:
        key = bytes.fromhex(secret.read_text(encoding="utf-8")) if secret.exists() else None
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected a readable key in '{secret}'.") from error
    return read(folder / LEDGER, key)


def _write_secret(path: Path, key: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(key.hex())


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a model.safetensors into a model.

    Raises:
        ValueError: If the file is missing, broken, or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        load_model(model, str(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"Expected weights of this model in '{path}', got: {str(error).strip()}"
        ) from error


def load_run(path: str | Path) -> Run:
    """Returns (model, config, report) of a finished run.

    The model is built anew from the run's configuration and gets the trained weights.

    Args:
        path: The run's directory, `runs/<name>`.

    Raises:
        ValueError: If there is no finished run, or its files are broken.
    """
    from omegaconf import DictConfig, OmegaConf

    from dpsgd.components import build_model
    from dpsgd.placement import Placement

    folder = Path(path).expanduser()
    missing = [name for name in (CONFIG, REPORT, MODEL) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"Expected a finished run in '{folder}', but {missing} is missing.")
    try:
        config = OmegaConf.load(folder / CONFIG)
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except Exception as error:
        raise ValueError(f"Expected readable files in '{folder}', got: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"Expected settings in '{folder / CONFIG}', got a list.")
    model = Placement.from_names("cpu", config.dtype).model(build_model(config))
    load_weights(model, folder / MODEL)
    return Run(model.eval(), config, report)
