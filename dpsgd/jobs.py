"""The jobs of a sweep (`-m`): each tells how it ended, whatever process or machine it ran in."""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.panel import Panel

from dpsgd import durable, metrics, signals

ENDED, INTERRUPTED, NOT_BEGUN, FAILED, CRASHED = (
    "ended", "interrupted", "not begun", "failed", "crashed",
)  # fmt: skip
EXIT_BAD_INPUT = 2
_BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
_FOLDER = ".jobs"  # of the sweep's directory, while the sweep runs
_SECRET = "privacy.key"

_begun_here = False  # whether this process is the one that was typed, and not one that it started


@dataclass(frozen=True)
class Outcome:
    """How a job of a sweep ended.

    Attributes:
        number: Of the job.
        run: Name of its directory.
        settings: What was set for this job and not for all.
        status: One of the words above.
        words: What was wrong.
    """

    number: int
    run: str
    settings: str
    status: str
    words: str = ""

    def __str__(self) -> str:
        return f"job {self.number} ({self.settings})" if self.settings else f"job {self.number}"


class Quiet(Console):
    """The console of a job among others: keeps notes and banners, and shows nothing."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def print(self, *objects: Any, **options: Any) -> None:
        """Keeps the panels."""
        self.notes += [f"{o.title}: {o.renderable}" for o in objects if isinstance(o, Panel)]


def begin(config: DictConfig) -> None:
    """Prepares this process and the sweep's directory for the jobs, before they are launched."""
    global _begun_here
    _begun_here = True
    shutil.rmtree(_folder(config.hydra.sweep.dir), ignore_errors=True)
    if config.hydra.launcher._target_ != _BASIC:
        signals.relaying()


def console() -> Console:
    """Returns where a job writes: in the process that was typed as a single run does."""
    return Console() if _begun_here else Quiet()


def run(
    work: Callable[[Console], Mapping[str, Any]], name: str, explain: Callable[[Exception], str]
) -> None:
    """Runs a job and records how it ended; a job that fails leaves the others alone.

    Args:
        work: The job, which returns its report.
        name: Of its directory.
        explain: Returns what is wrong with a user's input in words. Raises what is no such error.
    """
    stop, own = signals.of_jobs(patient=not _begun_here), console()
    settings = HydraConfig.get()
    folder = Path(settings.sweep.dir)
    status, words, report = NOT_BEGUN, "", None
    if not stop.asked:
        try:
            with stop.ending(abruptly=True):
                report = work(own)
            status = INTERRUPTED if report["interrupted"] else ENDED
        except KeyboardInterrupt:
            status = INTERRUPTED
        except BrokenPipeError:
            raise
        except Exception as error:
            status, words = _failure(error, explain)
    outcome = Outcome(settings.job.num, name, _swept(folder), status, words)
    _record(folder, outcome)
    if words or not _begun_here:
        _tell(outcome, report, own.notes if isinstance(own, Quiet) else [])
    if status == INTERRUPTED:
        stop.hand_over()


def _failure(error: Exception, explain: Callable[[Exception], str]) -> tuple[str, str]:
    try:
        return FAILED, explain(error)
    except Exception:
        return CRASHED, "".join(traceback.format_exception(error)).rstrip()


def collect(folder: Path) -> list[Outcome]:
    """Returns how the jobs of a sweep ended, by number, and removes what they recorded."""
    files = _folder(folder).glob("*.json")
    found = [Outcome(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    shutil.rmtree(_folder(folder), ignore_errors=True)
    return sorted(found, key=lambda outcome: outcome.number)


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """Prints what was wrong, once for all jobs it was wrong in, and returns the exit status.

    Raises:
        KeyboardInterrupt: If a job was interrupted.
    """
    wrong: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.words:
            wrong.setdefault(outcome.words, []).append(outcome)
    for words, those in wrong.items():
        which = "" if len(outcomes) == 1 else f" in {', '.join(map(str, those))}"
        print(f"Error{which}: {words}", file=sys.stderr)
    found = {outcome.status for outcome in outcomes}
    if found & {INTERRUPTED, NOT_BEGUN}:
        raise KeyboardInterrupt
    return 1 if CRASHED in found else EXIT_BAD_INPUT if FAILED in found else 0


def _folder(sweep: str | Path) -> Path:
    return Path(sweep) / _FOLDER


def _record(sweep: Path, outcome: Outcome) -> None:
    folder = _folder(sweep)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # words of a crash may hold anything
    text = json.dumps(asdict(outcome))
    durable.write(folder / f"{outcome.number}.json", text.encode())


def _tell(outcome: Outcome, report: Mapping[str, Any] | None, notes: Sequence[str]) -> None:
    """Prints one line about a job, and its notes under it, all at once."""
    lines = [f"{outcome}: {_result(outcome, report)}", *(f"    {note}" for note in notes)]
    with suppress(OSError):
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()


def _result(outcome: Outcome, report: Mapping[str, Any] | None) -> str:
    if report is None:
        first = outcome.words.splitlines()[-1 if outcome.status == CRASHED else 0 :]
        return f"{outcome.status}: {first[0]}" if first else outcome.status
    name = metrics.headline(report["test"])
    test = [] if name is None else [f"{name} {metrics.shown(name, report['test'][name])}"]
    steps = f"{outcome.status} at step {report['steps']} of {report['planned_steps']}"
    parts = [
        steps,
        *(words.replace("_", " ") for words in test),
        f"epsilon {report['epsilon']:.3f} alone",
        f"{report['seconds']:.1f} s",
    ]
    return ", ".join(parts)


def _swept(folder: Path) -> str:
    """The overrides of this job that are not the same for all jobs of the sweep."""
    own = [text for text in HydraConfig.get().overrides.task if not text.startswith(_SECRET)]
    try:
        whole = OmegaConf.load(folder / "multirun.yaml").hydra.overrides.task
        typed = [text for text in whole if not text.startswith(_SECRET)]
        overrides = OverridesParser.create().parse_overrides(typed)
    except (OSError, HydraException):
        return ", ".join(own)
    keys = {override.key_or_group for override in overrides if override.is_sweep_override()}
    return ", ".join(text for text in own if text.partition("=")[0] in keys)
