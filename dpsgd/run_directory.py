"""A run's directory: what may be published, and a locked drawer for what may not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dpsgd import durable, rng
from dpsgd.checkpoint import Checkpoints
from dpsgd.ledger import Charged, Ledger, read
from dpsgd.tensor_files import TensorFiles

if TYPE_CHECKING:
    from omegaconf import DictConfig

MODEL = "model.safetensors"
CONFIG = "config.yaml"
REPORT = "report.json"
PAGE = "report.html"
METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
LEDGER_KEY = "ledger_key"
KEY = "key"
ATTEMPT = "attempt.json"
CHECKPOINTS = "checkpoints"
HUGGING_FACE = "hf"


class RunDirectory:
    """Creates, fills and reopens `runs/<name>/`.

    Public: config.yaml, metrics.jsonl, ledger.jsonl, checkpoints/, tensorboard/, model.safetensors,
    hf/ (a Hugging Face model in its library's own format), report.json and report.html.
    Private, mode 0700: private/, with the key (0600) and what is known of the attempt until the run
    ends, the ledger's own key, and diagnostics if they were asked for.

    Raises:
        ValueError: If the directory holds a run that has ended.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.private = self.path / "private"
        self.unfinished = self._under_way()

    def _under_way(self) -> bool:
        """Whether a run has begun here and not ended; raises if it has ended."""
        if (self.private / KEY).exists():
            return True
        if any((self.path / name).exists() for name in (CONFIG, LEDGER, MODEL)):
            raise ValueError(
                f"Expected a new run directory or one to go on with, but '{self.path}' holds a run "
                "that has ended, or whose private/key is gone. For another run, name a new run.dir."
            )
        return False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the directory if it is new, and holds it against every other process.

        Raises:
            ValueError: If another process works in it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.private.mkdir(mode=0o700, exist_ok=True)
            self.private.chmod(0o700)
        except OSError as error:
            raise ValueError(
                f"Expected a directory that can be written, got '{self.path}': {error.strerror}."
            ) from error
        with ExitStack() as stack:
            try:
                stack.enter_context(durable.locked(self.private))
            except BlockingIOError as error:
                raise ValueError(
                    f"Expected one process per run, but another one works in '{self.path}'. Wait "
                    "for it, or choose another run.dir."
                ) from error
            if self._under_way() != self.unfinished:
                raise ValueError(
                    f"Another process has begun or ended a run in '{self.path}'. Try again."
                )
            durable.remove_leftovers(self.path)
            durable.remove_leftovers(self.private)
            yield

    def begin(self, key: bytes, record: Mapping[str, Any], config: str) -> None:
        """Stores what an attempt needs where only its owner can read it, and the configuration.

        Args:
            key: The attempt's key.
            record: What is known of the attempt, plain values.
            config: The resolved configuration as YAML, without a key.
        """
        if not (self.private / LEDGER_KEY).exists():
            self._write_secret(LEDGER_KEY, rng.derive(key, "ledger").hex())
        self._write_secret(KEY, key.hex())
        text = json.dumps({**record, **self.place()})
        self._write_secret(ATTEMPT, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n")
        durable.write(self.path / CONFIG, config.encode())

    def key(self) -> bytes | None:
        """Returns the attempt's key, None if it is gone or damaged."""
        return _secret(self.private / KEY)

    def record(self) -> dict[str, Any]:
        """Returns what `begin` stored of the attempt, nothing if it is gone or damaged."""
        try:
            digest, text, _ = (self.private / ATTEMPT).read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError):
            return {}
        good = hashlib.sha256(text.encode()).hexdigest() == digest
        return dict(json.loads(text)) if good else {}

    def place(self) -> dict[str, Any]:
        """Returns what tells this directory from a copy of it: a copy has another of both."""
        inode = self.private.stat().st_ino if self.private.exists() else 0
        return {"path": str(self.path.resolve()), "inode": inode}

    def config(self) -> DictConfig:
        """Returns the configuration of the run.

        Raises:
            ValueError: If it cannot be read.
        """
        from dpsgd.saved_run import read_config

        return read_config(self.path / CONFIG)

    def clear(self) -> None:
        """Removes what a run left that did not get to its first step.

        Raises:
            ValueError: If it has charged a step: that must not be forgotten.
        """
        if (self.private / LEDGER_KEY).exists():
            charged = self.charged_so_far(None)
            if charged is not None and charged.steps:
                raise ValueError(f"Expected a run that charged nothing in '{self.path}'.")
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
        for path in (self.path / LEDGER, self.private / ATTEMPT, self.private / LEDGER_KEY):
            path.unlink(missing_ok=True)

    def remove_results(self) -> None:
        """Removes report and model of an interruption, which are not those of what comes now."""
        for name in (REPORT, PAGE, MODEL):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / HUGGING_FACE, ignore_errors=True)

    def new_ledger(self, plan: Mapping[str, Any]) -> Ledger:
        """Returns the ledger of a new run."""
        return Ledger(self.path / LEDGER, self._ledger_key(), plan)

    def ledger(self, attempt: int) -> Ledger:
        """Returns the ledger of the run, to go on with it."""
        return Ledger.resumed(self.path / LEDGER, self._ledger_key(), attempt)

    def charged_so_far(self, head: str | None) -> Charged | None:
        """Returns what the ledger says, None without a ledger or with nothing but a torn line.

        Args:
            head: The HMAC of a line that must be there.

        Raises:
            ValueError: If the ledger is damaged, was edited or cut.
        """
        path = self.path / LEDGER
        if head is None and not (path.exists() and b"\n" in path.read_bytes()):
            return None
        return read(path, self._ledger_key(), head)

    def checkpoints(self, files: TensorFiles | None = None) -> Checkpoints:
        """Returns the run's checkpoints.

        Args:
            files: How tensors are written, if any are.
        """
        return Checkpoints(self.path / CHECKPOINTS, self._ledger_key(), files)

    def save_model(self, model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes model.safetensors, tied parameters once, and hf/ of a Hugging Face model.

        Args:
            model: The model.
            weights: What to write where the model does not hold it, being sharded.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file, save_model

        from dpsgd.models.hf_folder import is_huggingface, save_folder

        target = self.path / f"{durable.MARK}{MODEL}"
        try:
            if weights is None:
                save_model(model, str(target))
            else:
                save_file(dict(weights), str(target))
            durable.write(self.path / MODEL, target.read_bytes())
            if is_huggingface(model):
                save_folder(model, self.path / HUGGING_FACE, weights)
        except SafetensorError as error:  # of an input or output error
            raise OSError(errno.EIO, str(error), str(self.path / MODEL)) from error
        finally:
            target.unlink(missing_ok=True)

    @property
    def ended(self) -> bool:
        """Whether the ledger says that the run ended, though its key is still there."""
        charged = self.charged_so_far(None) if self.unfinished else None
        return charged is not None and charged.ended

    def finish(self) -> None:
        """Destroys the key, without which nobody can subtract the noise, and ends the attempt."""
        (self.private / ATTEMPT).unlink(missing_ok=True)
        destroy_key(self.private / KEY)

    def _ledger_key(self) -> bytes:
        key = _secret(self.private / LEDGER_KEY)
        if key is None:
            raise ValueError(
                f"Expected the ledger's key in '{self.private / LEDGER_KEY}', got none that is "
                "whole: without it nothing of this run can be trusted. Start anew in another "
                "run.dir; what was spent stays spent."
            )
        return key

    def _write_secret(self, name: str, text: str) -> None:
        durable.write(self.private / name, text.encode(), durable.SECRET)


def destroy_key(path: Path) -> None:
    """Overwrites and removes a key, if it is there."""
    if path.exists():
        with path.open("r+b") as file:
            file.write(b"\0" * path.stat().st_size)
            file.flush()
            os.fsync(file.fileno())
        path.unlink()


def write_report(path: Path, report: Mapping[str, Any], config: str) -> None:
    """Writes report.json and report.html of a run.

    The JSON holds the SHA-256 of the model, of the configuration and of itself, so that no damaged
    file is taken for the run's.

    Args:
        path: The run's directory.
        report: The final report.
        config: The resolved configuration as YAML, without a key.
    """
    from dpsgd.report_html import html_report

    folder = sorted(f"{HUGGING_FACE}/{file.name}" for file in (path / HUGGING_FACE).glob("*"))
    files = {name: _sha256(path / name) for name in (MODEL, CONFIG, *folder)}
    whole = {**report, "files": files}
    whole["sha256"] = _report_digest(whole)
    durable.write(path / REPORT, (json.dumps(whole, indent=2) + "\n").encode())
    durable.write(path / PAGE, html_report(report, config).encode())


def read_report(path: Path) -> dict[str, Any]:
    """Returns the final report of a run directory, if it and the files that it names are whole.

    Raises:
        ValueError: If a file is missing, damaged or not the one that the report was written for.
    """
    try:
        report = json.loads((path / REPORT).read_text(encoding="utf-8"))
        whole = report["sha256"] == _report_digest(report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected a readable report in '{path / REPORT}', got: {error}"
        ) from error
    if not whole:
        raise ValueError(f"Expected the report as it was written, but '{path / REPORT}' differs.")
    for name, digest in report["files"].items():
        if _sha256(path / name) != digest:
            raise ValueError(f"Expected the file of this run, but '{path / name}' is another one.")
    return dict(report)


def charged(path: str | Path) -> Charged:
    """Returns what the ledger of a run directory says, verified if its key is still there.

    Raises:
        ValueError: If there is no ledger, or it is damaged or was edited.
    """
    folder = Path(path).expanduser()
    secret = folder / "private" / LEDGER_KEY
    key = _secret(secret)
    if key is None and secret.exists():
        raise ValueError(f"Expected a readable key in '{secret}'.")
    return read(folder / LEDGER, key)


def _secret(path: Path) -> bytes | None:
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return key if len(key) == rng.KEY_BYTES else None


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"Expected a file '{path}': {error.strerror}.") from error


def _report_digest(report: Mapping[str, Any]) -> str:
    """SHA-256 of a report but for its time, so that runs with equal results have equal ones."""
    rest = {name: value for name, value in report.items() if name not in ("sha256", "seconds")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
