"""Long runs: nothing grows with the number of steps but the files."""

import itertools
import os
import statistics
import time
from pathlib import Path

import pytest
from command_line import Running

from dpsgd import ledger
from dpsgd.ledger import Ledger
from dpsgd.run_directory import charged

STEPS = 100_000
PLAN = {
    "sampling": {"sampler": "poisson", "sample_rate": 0.001},
    "unit": "record",
    "num_steps": 10**6,
    "noise_multiplier": 2.0,
    "delta": 1e-5,
    "adjacency": "add_remove",
    "accountant": "rdp",
}


def memory(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.slow
def test_a_hundred_thousand_steps(tmp_path):
    running = Running(
        "model=linear", "device=cpu", f"trainer.num_steps={STEPS}", "sampler.sample_rate=0.01",
        "trainer.physical_batch_size=32", "privacy.noise_multiplier=50", "accountant=rdp",
        "trainer.evaluate_every=1000", "checkpoint.every=500", "run.dir=r", cwd=tmp_path,
    )  # fmt: skip
    book = tmp_path / "r" / "ledger.jsonl"
    while not book.exists():
        time.sleep(0.1)
    line = None
    seen = []
    while True:
        time.sleep(2)
        try:
            size, when = book.stat().st_size, time.monotonic()
            seen.append(
                (size, when, memory(running.pid), len(os.listdir(f"/proc/{running.pid}/fd")))
            )
        except (FileNotFoundError, StopIteration, ProcessLookupError):
            break
        if (tmp_path / "r" / "report.json").exists():
            break
    done = running.wait(600)
    assert done.returncode == 0, done.stderr
    assert charged(tmp_path / "r").steps == STEPS
    line = book.stat().st_size / STEPS
    seen = seen[3:-3]  # neither the start nor the report at the end
    speeds = [(b[0] - a[0]) / line / (b[1] - a[1]) for a, b in itertools.pairwise(seen)]
    third = len(seen) // 3
    first, last = statistics.median(speeds[:third]), statistics.median(speeds[-third:])
    print(f"steps/s {first:.0f} -> {last:.0f}, MB {seen[0][2]:.0f} -> {seen[-1][2]:.0f}")
    assert last > 0.7 * first, "steps get slower"
    assert seen[-1][2] - seen[len(seen) // 4][2] < 20, "memory grows"
    assert max(s[3] for s in seen) - min(s[3] for s in seen) <= 3, "files stay open"


@pytest.mark.slow
def test_a_ledger_of_a_million_steps_is_verified_in_seconds(tmp_path, key, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    book = Ledger(tmp_path / "l", key, PLAN)
    for step in range(10**6):
        book.intend(step, 2.0)
    book.close()
    begun = time.process_time()
    assert ledger.read(tmp_path / "l", key).steps == 10**6
    assert time.process_time() - begun < 30
