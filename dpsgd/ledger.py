"""The ledger of a run: what is about to be spent, written down before any data is touched."""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dpsgd import durable
from dpsgd.accounting import epsilon_of
from dpsgd.accounting.releases import NoiseRuns, Releases
from dpsgd.sampling import described

_VERSION = 1
_START = "0" * 64
_MAC = b',"mac":"'


class Ledger:
    """An append-only file of JSON lines, chained by HMAC-SHA-256 under a key of the run.

    The first line is the plan, then one line per step says that the step is about to spend its
    noise. It is on the disk before the step draws a record, so a crash can charge a step too much
    but never one too few. The last line of a run that ended says so.

    Args:
        path: The file, which must not exist.
        key: 32 bytes, derived from the run's key: it proves the lines and reveals no noise.
        plan: What is accounted for, plain values.

    Attributes:
        attempt: Number of the attempt at the run whose steps are charged from now on.

    Raises:
        ValueError: If there is a ledger already.
    """

    def __init__(self, path: Path, key: bytes, plan: Mapping[str, Any]) -> None:
        self._key = key
        self._mac = _START
        self.attempt = 0
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        except FileExistsError as error:
            raise ValueError(
                f"Expected no ledger at '{path}', but a run has written one."
            ) from error
        self._append({"kind": "plan", "version": _VERSION, **plan})
        durable.sync_directory(path.parent)

    @classmethod
    def resumed(cls, path: Path, key: bytes, attempt: int) -> Ledger:
        """Returns a ledger that goes on, every line of it verified.

        A torn last line, as a crash leaves it, is taken off: its step had touched no data yet.

        Raises:
            ValueError: As `read` does, or if the run has ended.
        """
        before = read(path, key)
        if before.ended:
            raise ValueError(f"Expected a ledger that goes on, but the run of '{path}' has ended.")
        if attempt < before.last_attempt:
            raise ValueError(
                f"Expected attempt {before.last_attempt} or a later one to go on, got {attempt}."
            )
        ledger = cls.__new__(cls)
        ledger._key, ledger.attempt = key, attempt
        with path.open("rb") as file:
            whole = sum(len(raw) + 1 for raw in _whole_lines(file))
            file.seek(0)
            for raw in _whole_lines(file):
                last = raw
        ledger._mac = json.loads(last)["mac"]
        ledger._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.ftruncate(ledger._file, whole)
        os.fsync(ledger._file)
        return ledger

    @property
    def head(self) -> str:
        """The HMAC of the last line, which stands for all lines up to it."""
        return self._mac

    def intend(self, step: int, noise_multiplier: float, attempt: int | None = None) -> None:
        """Charges a step; call it before the step touches data.

        Args:
            step: Number of the step.
            noise_multiplier: Of this step.
            attempt: Number of the attempt, the ledger's own by default; a repeated step of the same
                attempt has the same noise and is charged once.
        """
        number = self.attempt if attempt is None else attempt
        line = {"kind": "intent", "attempt": number, "step": step, "noise": noise_multiplier}
        self._append(line)

    def end(self, steps: int) -> None:
        """Writes that the run ended after so many steps, and closes the file."""
        self._append({"kind": "end", "steps": steps})
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":"))
        mac = _next_mac(self._key, self._mac, text.encode())
        try:
            durable.append(self._file, f'{text[:-1]},"mac":"{mac}"}}\n'.encode())
            os.fsync(self._file)
        except BaseException:  # half a line may be there: nothing can follow it
            self.close()
            raise
        self._mac = mac


@dataclass
class _Attempt:
    """The charged steps of one attempt: those from `start` on, without a gap."""

    start: int
    noise: list[float] = field(default_factory=list)

    def runs(self) -> NoiseRuns:
        return tuple((sigma, sum(1 for _ in same)) for sigma, same in groupby(self.noise))


class AttemptCharges(NamedTuple):
    """What one attempt at a run charged.

    Attributes:
        number: Of the attempt.
        start: Its first step.
        noise: Its noise multipliers with the number of steps each, in order.
    """

    number: int
    start: int
    noise: NoiseRuns


@dataclass(frozen=True)
class Charged:
    """What a ledger says.

    Attributes:
        plan: The plan's line.
        attempts: What each attempt charged that charged a step.
        ended: Whether the run wrote its end.
        torn: Whether the last line is incomplete, as a crash leaves it; it counts as a step.
        verified: Whether the chain was checked with the key.
    """

    plan: Mapping[str, Any]
    attempts: tuple[AttemptCharges, ...]
    ended: bool
    torn: bool
    verified: bool

    @property
    def last_attempt(self) -> int:
        """The number of the last attempt that charged a step, -1 without one."""
        return self.attempts[-1].number if self.attempts else -1

    @property
    def steps(self) -> int:
        """How many steps were charged."""
        return sum(count for attempt in self.attempts for _, count in attempt.noise)

    @property
    def noise(self) -> NoiseRuns:
        """The noise multipliers of all attempts, with the number of steps each."""
        return tuple(run for attempt in self.attempts for run in attempt.noise)

    def releases(self) -> Releases:
        """Returns the events that were charged."""
        sampler = described(self.plan["sampling"])
        counts: dict[Any, int] = {}
        for attempt in self.attempts:
            for event, count in sampler.releases(attempt.noise, attempt.start):
                counts[event] = counts.get(event, 0) + count
        return tuple(counts.items())

    def epsilon(self) -> float:
        """Returns the epsilon of the charged steps, from the ledger's lines alone."""
        plan = self.plan
        return epsilon_of(self.releases(), plan["delta"], plan["accountant"], plan["adjacency"])


def read(path: str | Path, key: bytes | None = None, head: str | None = None) -> Charged:
    """Reads a ledger and checks every line.

    Args:
        path: The file.
        key: The ledger's key, to verify the chain; without it only the form is checked.
        head: The HMAC of a line that must be there, of a `Ledger.head` of the past.

    Raises:
        ValueError: If the file is missing, a line is no line of a ledger, lines were edited,
            removed from the middle, reordered or added (with the key), the steps are not those of
            one run, or the line of `head` is gone.
    """
    try:
        with Path(path).open("rb") as file:
            lines = _Lines(key, head)
            for raw in _whole_lines(file):
                lines.add(raw)
            file.seek(0, os.SEEK_END)
            torn = file.tell() > lines.bytes
    except OSError as error:
        raise ValueError(f"Expected a ledger at '{path}': {error.strerror}.") from error
    if not lines.number:
        raise ValueError(f"Expected the plan in the first line of '{path}'.")
    if head is not None and not lines.head_seen:
        raise ValueError(
            f"Expected every line that '{path}' once had, but its end was cut off: steps that "
            "were spent would not be charged. Put the whole ledger back."
        )
    return lines.charged(torn, key is not None)


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines that end in a newline, without it."""
    for raw in file:
        if raw.endswith(b"\n"):
            yield raw[:-1]


class _Lines:
    """The lines of a ledger, checked one by one."""

    def __init__(self, key: bytes | None, head: str | None) -> None:
        self._key = key
        self._head = head
        self._mac = _START
        self._plan: dict[str, Any] = {}
        self._attempts: dict[int, _Attempt] = {}
        self._ended = False
        self.number = 0
        self.bytes = 0
        self.head_seen = False

    def add(self, raw: bytes) -> None:
        self.number += 1
        self.bytes += len(raw) + 1
        line = self._parsed(raw)
        if self._ended:
            raise ValueError(f"Line {self.number} of the ledger comes after the run's end.")
        if line["kind"] == "plan":
            self._plan = line
        elif line["kind"] == "end":
            self._ended = True
        else:
            self._charge(line["attempt"], line["step"], float(line["noise"]))

    def charged(self, torn: bool, verified: bool) -> Charged:
        if torn and not self._ended:  # a step whose charge was being written
            attempt = self._attempts.setdefault(max(self._attempts, default=0), _Attempt(0))
            attempt.noise.append(min(attempt.noise, default=self._plan["noise_multiplier"]))
        every = sorted(self._attempts.items())
        attempts = tuple(AttemptCharges(n, a.start, a.runs()) for n, a in every)
        return Charged(self._plan, attempts, self._ended, torn, verified)

    def _charge(self, number: int, step: int, noise: float) -> None:
        attempt = self._attempts.setdefault(number, _Attempt(step))
        place = step - attempt.start
        if number != max(self._attempts) or not 0 <= place <= len(attempt.noise):
            raise ValueError(f"Line {self.number} of the ledger is out of order.")
        if place == len(attempt.noise):
            attempt.noise.append(noise)
        elif attempt.noise[place] != noise:
            raise ValueError(f"Line {self.number} of the ledger gives step {step} other noise.")

    def _parsed(self, raw: bytes) -> dict[str, Any]:
        try:
            line = json.loads(raw)
            mac, kind = line.pop("mac"), line["kind"]
            good = isinstance(mac, str) and (kind == "plan") == (self.number == 1)
            if kind == "plan":
                _check_version(line)
                good = good and type(line["noise_multiplier"]) in (int, float)
            elif kind == "intent":
                whole = (line["attempt"], line["step"])
                good = good and all(type(value) is int and value >= 0 for value in whole)
                good = good and type(line["noise"]) in (int, float) and line["noise"] > 0
            else:
                good = good and kind == "end"
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError, TypeError):
            good = False
        if not good:
            raise ValueError(f"Line {self.number} of the ledger is damaged.")
        if self._key is not None:
            expected = _next_mac(self._key, self._mac, raw[: raw.rindex(_MAC)] + b"}")
            if not hmac.compare_digest(expected.encode(), mac.encode()):
                raise ValueError(
                    f"Line {self.number} of the ledger was changed, or a line before it removed: "
                    "its HMAC is not that of the chain."
                )
        self._mac = mac
        self.head_seen = self.head_seen or mac == self._head
        return line


def _check_version(line: Mapping[str, Any]) -> None:
    if line["version"] != _VERSION:
        raise ValueError(f"Expected version {_VERSION} of the ledger, got {line['version']}.")


def _next_mac(key: bytes, before: str, text: bytes) -> str:
    return hmac.digest(key, before.encode() + text, "sha256").hex()
