"""A short run with all that makes resuming hard, and what must hold however it was interrupted."""

import hashlib
import json
from pathlib import Path

import shims
from command_line import Running, command

from dpsgd.run_directory import charged

KEY = "privacy.key='" + "ab" * 32 + "'"
SHORT = (
    "model=mlp", "model.dropout=0.2", "clipping=adaptive", "device=cpu", "accountant=rdp",
    "trainer.num_steps=7", "privacy.noise_multiplier=5", "sampler.sample_rate=0.1",
    "trainer.physical_batch_size=32", "trainer.evaluate_every=3", "checkpoint.every=2",
    "run.dir=r", KEY,
)  # fmt: skip
STEPS = 7


def watched(folder):
    return shims.WATCH.format(path=str(Path(folder) / "released"))


def start(folder, *extra, before="", **options):
    return Running(*SHORT, *extra, cwd=folder, before=watched(folder) + before, **options)


def finish(folder, *extra, **options):
    """Goes on to the end, which the run may have reached already."""
    done = command(*SHORT, *extra, cwd=folder, before=watched(folder), check=False, **options)
    assert done.returncode == 0 or "has ended" in done.stderr, done.stderr + done.stdout
    return done


def model(folder):
    return hashlib.sha256((Path(folder) / "r" / "model.safetensors").read_bytes()).hexdigest()


def releases(folder):
    lines = (Path(folder) / "released").read_text().splitlines()
    return [(int(step), digest) for step, digest in map(str.split, lines)]


def check_nothing_is_uncharged(folder):
    """Each release is in the ledger; one that was made twice was the same twice."""
    found = charged(Path(folder) / "r")
    assert found.verified
    made = set(releases(folder))
    per_step = {}
    for step, digest in made:
        per_step.setdefault(step, set()).add(digest)
    assert len(made) <= found.steps
    if found.last_attempt == 0:
        assert all(len(digests) == 1 for digests in per_step.values()), per_step
        assert found.steps == STEPS


def history(folder):
    return json.loads((Path(folder) / "r" / "report.json").read_text())["history"]
