"""The ledger of a run: what is about to be spent, written down before any data is touched."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsgd.accounting import epsilon_of
from dpsgd.accounting.releases import Releases
from dpsgd.sampling import described

_VERSION = 1
_START = "0" * 64


class Ledger:
    """An append-only file of JSON lines, chained by HMAC-SHA-256 under a key of the run.

    The first line is the plan, then one line per step says that the step is about to spend its
    noise. It is on the disk before the step draws a record, so a crash can charge a step too much
    but never one too few. The last line of a run that ended says so.

    Args:
        path: The file, which must not exist.
        key: 32 bytes, derived from the run's key: it proves the lines and reveals no noise.
        plan: What is accounted for, plain values.

    Raises:
        ValueError: If there is a ledger already.
    """

    def __init__(self, path: Path, key: bytes, plan: Mapping[str, Any]) -> None:
        self._key = key
        self._mac = _START
        try:
            self._file = path.open("xb")
        except FileExistsError as error:
            raise ValueError(
                f"Expected no ledger at '{path}', but a run has written one."
            ) from error
        self._append({"kind": "plan", "version": _VERSION, **plan})

    def intend(self, step: int, noise_multiplier: float, attempt: int = 0) -> None:
        """Charges a step; call it before the step touches data.

        Args:
            step: Number of the step.
            noise_multiplier: Of this step.
            attempt: Number of the attempt at the run; a repeated step of the same attempt has the
                same noise and is charged once.
        """
        line = {"kind": "intent", "attempt": attempt, "step": step, "noise": noise_multiplier}
        self._append(line)

    def end(self, steps: int) -> None:
        """Writes that the run ended after so many steps, and closes the file."""
        self._append({"kind": "end", "steps": steps})
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":"))
        self._mac = _next_mac(self._key, self._mac, text)
        self._file.write(f'{text[:-1]},"mac":"{self._mac}"}}\n'.encode())
        self._file.flush()
        os.fsync(self._file.fileno())


@dataclass(frozen=True)
class Charged:
    """What a ledger says.

    Attributes:
        plan: The plan's line.
        steps: Charged steps.
        noise: Their noise multipliers with the number of steps each, in order.
        ended: Whether the run wrote its end.
        torn: Whether the last line is incomplete, as a crash leaves it; it counts as a step.
        verified: Whether the chain was checked with the key.
    """

    plan: Mapping[str, Any]
    steps: int
    noise: tuple[tuple[float, int], ...]
    ended: bool
    torn: bool
    verified: bool

    def releases(self) -> Releases:
        """Returns the events that were charged."""
        return described(self.plan["sampling"]).releases(self.noise)

    def epsilon(self) -> float:
        """Returns the epsilon of the charged steps, from the ledger's lines alone."""
        plan = self.plan
        return epsilon_of(self.releases(), plan["delta"], plan["accountant"], plan["adjacency"])


def read(path: str | Path, key: bytes | None = None) -> Charged:
    """Reads a ledger and checks every line.

    Args:
        path: The file.
        key: The ledger's key, to verify the chain; without it only the form is checked.

    Raises:
        ValueError: If the file is missing, a line is no line of a ledger, lines were edited,
            removed from the middle, reordered or added (with the key), or the steps are not those
            of one run.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"Expected a ledger at '{path}': {error.strerror}.") from error
    *lines, tail = data.split(b"\n")
    parsed, mac = [], _START
    for number, raw in enumerate(lines, 1):
        line, mac = _line(raw, number, key, mac)
        parsed.append(line)
    if not parsed or parsed[0]["kind"] != "plan":
        raise ValueError(f"Expected the plan in the first line of '{path}'.")
    return _charged(parsed, bool(tail), key is not None)


def _line(raw: bytes, number: int, key: bytes | None, before: str) -> tuple[dict[str, Any], str]:
    try:
        text = raw.decode()
        line = json.loads(text)
        mac = line.pop("mac")
        kind = line["kind"]
        if kind == "plan" and line["version"] != _VERSION:
            raise ValueError(f"Expected version {_VERSION} of the ledger, got {line['version']}.")
        known = {"plan": number == 1, "intent": number > 1, "end": number > 1}
        good = known.get(kind, False) and isinstance(mac, str)
        if kind == "intent":
            good = good and type(line["step"]) is int and type(line["attempt"]) is int
            good = good and type(line["noise"]) in (int, float) and line["noise"] > 0
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"Line {number} of the ledger is damaged.") from error
    if not good:
        raise ValueError(f"Line {number} of the ledger is damaged.")
    if key is not None:
        expected = _next_mac(key, before, text[: text.rindex(',"mac":')] + "}")
        if not hmac.compare_digest(expected, mac):
            raise ValueError(
                f"Line {number} of the ledger was changed, or a line before it removed: its HMAC "
                "is not that of the chain."
            )
    return line, mac


def _charged(lines: list[dict[str, Any]], torn: bool, verified: bool) -> Charged:
    charged: dict[tuple[int, int], float] = {}
    ended = False
    for number, line in enumerate(lines[1:], 2):
        if ended:
            raise ValueError(f"Line {number} of the ledger comes after the run's end.")
        if line["kind"] == "end":
            ended = True
            continue
        place = line["attempt"], line["step"]
        if charged.setdefault(place, line["noise"]) != line["noise"]:
            raise ValueError(f"Line {number} of the ledger gives step {line['step']} other noise.")
    multipliers = list(charged.values())
    if torn and not ended:  # a step whose charge was being written
        multipliers.append(min(multipliers, default=lines[0]["noise_multiplier"]))
    runs: list[tuple[float, int]] = []
    for noise in multipliers:
        if runs and runs[-1][0] == noise:
            runs[-1] = noise, runs[-1][1] + 1
        else:
            runs.append((noise, 1))
    return Charged(lines[0], len(multipliers), tuple(runs), ended, torn, verified)


def _next_mac(key: bytes, before: str, text: str) -> str:
    return hmac.new(key, f"{before}{text}".encode(), hashlib.sha256).hexdigest()
