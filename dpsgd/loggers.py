"""Where a run's reports go: JSON lines and TensorBoard, public things and private ones apart."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from dpsgd.trainer import StepReport


class Logger(ABC):
    """Receives the scalars of a step; used as a context manager."""

    @abstractmethod
    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes named scalars of a step."""

    @abstractmethod
    def flush(self) -> None:
        """Writes what is buffered."""

    @abstractmethod
    def close(self) -> None:
        """Writes what is buffered and closes the files."""

    def __enter__(self) -> Logger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class JsonLines(Logger):
    """One JSON object per step in a file.

    Args:
        path: The file.
        lines: How many lines of an interrupted run are kept; what comes after them is cut off.
    """

    def __init__(self, path: Path, lines: int = 0) -> None:
        self._file = path.open("a+b")
        self._digest = hashlib.sha256()
        self._file.seek(0)
        kept = 0
        for line in itertools.islice(self._file, lines):
            self._digest.update(line)
            kept += len(line)
        self._file.truncate(kept)

    @property
    def digest(self) -> str:
        """SHA-256 of the whole file."""
        return self._digest.hexdigest()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends {"step": ..., name: value, ...}."""
        line = json.dumps({"step": step, **scalars}).encode() + b"\n"
        self._digest.update(line)
        self._file.write(line)

    def flush(self) -> None:
        """Writes what is buffered."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard(Logger):
    """TensorBoard event files in a folder."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = step + 1 if step else None  # later steps of an interrupted run are not shown
        self._writer = SummaryWriter(log_dir=str(folder), max_queue=1000, purge_step=purge)
        self._time = time.time()  # of all events alike: the time of a step tells the drawn size

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds each scalar under its name."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step, walltime=self._time)

    def flush(self) -> None:
        """Writes what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the writer."""
        self._writer.close()


def history(path: Path) -> list[dict[str, float]]:
    """Returns the evaluations in a metrics file: step, epsilon, test_loss and other results."""
    rows = []
    with path.open("rb") as file:
        for line in file:
            try:
                found = dict(json.loads(line))
            except ValueError:  # damaged while the run was interrupted, which it was told
                continue
            test = {k.replace("/", "_"): v for k, v in found.items() if k.startswith("test/")}
            if test:
                rows.append({"step": found["step"], "epsilon": found["privacy/epsilon"], **test})
    return rows


def speed_scalar(expected_records: float, seconds: float) -> dict[str, float]:
    """Returns the speed averaged over the whole run, to be published once, at its end.

    Args:
        expected_records: As many as the steps taken draw on average, by the privacy plan; the
            drawn numbers are private.
        seconds: Time that they took together.
    """
    return {"speed/expected_records_per_second": expected_records / max(seconds, 1e-9)}


def public_scalars(report: StepReport) -> dict[str, float]:
    """Returns what may be published of a step.

    Nothing that depends on time is among it: the time of a step tells how many records were drawn.
    """
    return {
        "privacy/epsilon": report.epsilon,
        "optimizer/learning_rate": report.learning_rate,
        **{name.replace("_", "/", 1): value for name, value in report.test.items()},
    }


def private_scalars(report: StepReport) -> dict[str, float]:
    """Returns what must not be published of a step, under names that say so."""
    return {f"NOT_PRIVATE/{name}": value for name, value in report.private.items()}
