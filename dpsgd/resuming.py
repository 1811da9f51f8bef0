"""Whether a run starts, goes on exactly where it was, or has to begin a new attempt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from dpsgd import replay, rng
from dpsgd.budget import Budget
from dpsgd.checkpoint import Checkpoint
from dpsgd.config import fixed_key
from dpsgd.data import Dataset
from dpsgd.ledger import Charged
from dpsgd.parallel import World
from dpsgd.plan import PrivacyPlan
from dpsgd.run_directory import RunDirectory

_BROKEN = ["its key or private/attempt.json is not what it was"]


@dataclass(frozen=True)
class Start:
    """How a run starts or goes on.

    Attributes:
        key: The secret key of the attempt.
        attempt: Its number; 0 for a new run.
        streams: What noise and sampling take their keys from: a function of the key, of what the
            guarantee depends on, of the records and of the attempt, never of a name or a path.
        checkpoint: Where it goes on, None for a new run.
        replays: Whether every step repeats what an interrupted run would have done, bit for bit,
            so that nothing is charged twice.
        charged: What the ledger says so far, None for a new run.
        notes: What the user should be told.
        record: What is kept in private/ about the attempt.
    """

    key: bytes
    attempt: int
    streams: bytes
    checkpoint: Checkpoint | None
    replays: bool
    charged: Charged | None
    notes: tuple[str, ...]
    record: Mapping[str, Any]


def started(
    run: RunDirectory,
    config: DictConfig,
    data: Dataset,
    device: torch.device,
    key: bytes | None,
    processes: int = 1,
) -> Start:
    """Returns how a run starts or goes on; writes nothing.

    Args:
        run: Its directory, new or of an unfinished run.
        config: The resolved configuration.
        data: The records.
        device: Where the model will be.
        key: The key of a new run; by default the configuration's, or a fresh one.
        processes: How many processes train the model.

    Raises:
        ValueError: If settings that the guarantee depends on, or the records, are not those that
            the run began with; or its files do not allow it to go on.
    """
    where = replay.conditions(device, processes)
    if not run.unfinished:
        return _new(run, config, data, where, key or fixed_key(config) or rng.fresh_key())
    checkpoint, damaged = run.checkpoints().newest()
    charged = run.charged_so_far(None if checkpoint is None else checkpoint.facts["ledger"])
    if checkpoint is None or charged is None:
        if damaged or (charged is not None and charged.steps):
            raise ValueError(
                f"Expected a checkpoint to go on from in '{run.path}', got none that is whole"
                f"{': ' if damaged else ''}{'; '.join(damaged)}. What was spent stays spent: start "
                "anew in another run.dir."
            )
        return _new(run, config, data, where, key or fixed_key(config) or rng.fresh_key())
    _check_settings(charged.plan.get("settings", {}), config)
    notes = [f"Passed over a damaged checkpoint, {words}." for words in damaged]
    old, record = run.key(), run.record()
    reasons = _BROKEN
    if old is not None and record.get("key") == _name_of(old):
        again = _record(run, config, data, where, old, checkpoint.attempt)
        reasons = _reasons(record, again, config.checkpoint.allow_new_data)
        if charged.last_attempt > checkpoint.attempt:
            reasons.append(f"attempt {charged.last_attempt} has begun since its checkpoint")
    if reasons is _BROKEN and not config.checkpoint.allow_new_data:
        raise ValueError(
            f"Expected private/key and private/attempt.json in '{run.path}' as they were: without "
            "them nobody can tell whether the records are the same. Put them back, or go on with "
            "checkpoint.allow_new_data=true, with new noise, all charged on top of what is spent."
        )
    if reasons or old is None:
        number = 1 + max(charged.last_attempt, checkpoint.attempt, record.get("attempt", 0))
        old = rng.fresh_key()
        again = _record(run, config, data, where, old, number)
        again["fixed"] = again["fixed"] or record.get("fixed", False)
        notes.append(
            f"The run goes on from step {checkpoint.step} as a new attempt with new noise, since "
            f"{'; '.join(reasons)}. {_repeated(charged, checkpoint.step)}"
        )
    return Start(
        key=old,
        attempt=again["attempt"],
        streams=_streams(old, again),
        checkpoint=checkpoint,
        replays=not reasons,
        charged=charged,
        notes=tuple(notes),
        record=again,
    )


def fingerprint(data: Dataset, key: bytes) -> str:
    """Returns the fingerprint of the records by which an attempt with this key knows them."""
    return replay.fingerprint(data, rng.derive(key, "fingerprint"))


def check_records(data: Dataset, start: Start, world: World) -> None:
    """Raises unless all processes hold the same records.

    Raises:
        ValueError: If they do not.
    """
    if world.size > 1:
        own = start.record["records"] if world.leads else fingerprint(data, start.key)
        world.agree({"fingerprint": own}, "training records")


def check_plan(plan: PrivacyPlan, charged: Charged) -> None:
    """Raises unless the plan is the one at the head of the ledger.

    Raises:
        ValueError: With the figures of both.
    """
    now = plan.describe()
    before = {name: charged.plan.get(name) for name in now}
    changed = replay.differences(before, now)
    if changed:
        raise ValueError(_refusal("The privacy plan is not that of the run.", changed))


def budget(plan: PrivacyPlan, start: Start) -> Budget:
    """Returns what the attempt may spend, given all that is charged."""
    if start.charged is None or start.checkpoint is None:
        return Budget(plan, (), 0)
    others = [a for a in start.charged.attempts if a.number != start.attempt]
    own = [a.start for a in start.charged.attempts if a.number == start.attempt]
    return Budget(plan, others, own[0] if own else start.checkpoint.step)


def _new(
    run: RunDirectory, config: DictConfig, data: Dataset, where: Mapping[str, Any], key: bytes
) -> Start:
    record = _record(run, config, data, where, key, 0)
    return Start(key, 0, _streams(key, record), None, False, None, (), record)


def _streams(key: bytes, record: Mapping[str, Any]) -> bytes:
    """The key of noise and sampling. A fixed key couples worlds, so it leaves the records out."""
    guarantee = replay.digest(replay.critical(record["settings"])).hex()
    records = "" if record["fixed"] else record["records"]
    return rng.derive(key, f"streams {guarantee} {records}", record["attempt"])


def _record(
    run: RunDirectory,
    config: DictConfig,
    data: Dataset,
    where: Mapping[str, Any],
    key: bytes,
    attempt: int,
) -> dict[str, Any]:
    """What is kept in private/ of an attempt, to tell whether it can be replayed."""
    return {
        "attempt": attempt,
        "key": _name_of(key),
        "records": fingerprint(data, key),
        "conditions": dict(where),
        "settings": replay.settings(config),
        "fixed": config.privacy.key is not None,
        **run.place(),
    }


def _reasons(before: Mapping[str, Any], now: Mapping[str, Any], allow_new_data: bool) -> list[str]:
    """Why an exact replay is not possible; empty if it is.

    Args:
        before: What was kept of the attempt.
        now: The same as things are now, with the attempt of the checkpoint.
        allow_new_data: Whether other records are a reason, not an error.
    """
    if before["records"] != now["records"] and not allow_new_data:
        raise ValueError(
            "Expected the training records that the run began with, got others. Put them back, or "
            "start a new run. checkpoint.allow_new_data=true goes on with the new ones, with new "
            "noise, and charges every step on top of what is spent."
        )
    reasons = [
        f"{name} was {was} and is {is_now}"
        for kind in ("conditions", "settings")
        for name, was, is_now in replay.differences(before[kind], now[kind])
    ]
    if before["fixed"] != now["fixed"]:
        reasons.append("privacy.key was fixed, or is fixed now")
    if before["records"] != now["records"]:
        reasons.append("the records are not those that it began with")
    if before["path"] != now["path"] and before["inode"] != now["inode"]:
        reasons.append(f"the directory is a copy of '{before['path']}'")
    if before["attempt"] != now["attempt"]:
        reasons.append("the attempt before this one did not get to its first step")
    return reasons


def _name_of(key: bytes) -> str:
    """What a key is known by, which does not give it away."""
    return rng.derive(key, "name of the key").hex()


def _check_settings(before: Mapping[str, Any], config: DictConfig) -> None:
    """Raises unless the guarantee's settings are those in the first line of the ledger."""
    changed = replay.differences(before, replay.critical(replay.settings(config)))
    if changed:
        raise ValueError(
            _refusal("The guarantee of a run cannot change while it is under way.", changed)
        )


def _repeated(charged: Charged, step: int) -> str:
    """How many charged steps a new attempt takes anew, in words."""
    ends = [attempt.start + sum(n for _, n in attempt.noise) for attempt in charged.attempts]
    count = max(0, ends[-1] - step) if ends else 0
    if not count:
        return "No step is repeated."
    return f"{count} step{'s are' if count > 1 else ' is'} repeated and charged again."


def _refusal(words: str, changed: list[tuple[str, str, str]]) -> str:
    rows = [("setting", "the run's", "now"), *changed]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join(
        [
            words,
            *lines,
            "Go on with the run's settings (resume=RUN_DIR takes them), or start a new run in "
            "another run.dir.",
        ]
    )
