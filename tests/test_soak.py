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


def sample(pid, book):
    """Steps so far, seconds of processor time, MB of memory, open files of a process."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    seconds = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return book.stat().st_size, seconds, memory(pid), files


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
    seen = []
    while not (tmp_path / "r" / "report.json").exists():
        time.sleep(2)
        try:
            seen.append(sample(running.pid, book))
        except (FileNotFoundError, StopIteration, ProcessLookupError):  # it has ended
            break
    done = running.wait(600)
    assert done.returncode == 0, done.stderr
    assert charged(tmp_path / "r").steps == STEPS
    line = book.stat().st_size / STEPS
    seen = seen[3:-3]  # neither the start nor the report at the end
    times = [1e3 * (b[1] - a[1]) * line / (b[0] - a[0]) for a, b in itertools.pairwise(seen)]
    third = len(seen) // 3
    first, last = statistics.median(times[:third]), statistics.median(times[-third:])
    print(f"ms per step {first:.2f} -> {last:.2f}, MB {seen[0][2]:.0f} -> {seen[-1][2]:.0f}")
    assert last < 1.3 * first, "steps take longer and longer"
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
