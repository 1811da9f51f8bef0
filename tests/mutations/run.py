"""`make mutations`: plants one privacy bug after another and checks that its test fails.

python tests/mutations/run.py            # all of them
python tests/mutations/run.py noise      # those with the word in their name
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track
from table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("dpsgd", "configs", "tests", "pyproject.toml")
PASSED, FAILED = 0, 1
WORKERS = 2
SECONDS = 600


def copied(folder: Path) -> Path:
    """Returns a copy of what the tests need."""
    for part in PARTS:
        source = ROOT / part
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / part)
    return folder


def outcome(checkout: Path, tests: list[str]) -> int:
    """Returns pytest's exit status for tests in a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    marks = "not slow and not gpu and not hf"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore", "-m", marks, *tests],
        cwd=checkout,
        env=environment,
        capture_output=True,
        timeout=SECONDS,
    )
    return done.returncode


def planted(mutation: Mutation, checkout: Path) -> str | None:
    """Plants a bug, runs its test and takes the bug out; returns what went wrong, if anything."""
    file = checkout / "dpsgd" / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.before) != 1:
        return f"its code occurs {text.count(mutation.before)} times in {mutation.file}, not once"
    file.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        status = outcome(checkout, [mutation.test])
    finally:
        file.write_text(text, encoding="utf-8")
    if status == PASSED:
        return f"SURVIVED: {mutation.test} passes"
    return None if status == FAILED else f"its test did not run (pytest exit status {status})"


def main() -> int:
    """Runs the mutations and returns the exit status."""
    console = Console(soft_wrap=True)
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if all(word in m.name for word in words)]
    if not chosen:
        console.print(f"Expected words that a mutation's name has, got {words}.")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        checkouts: queue.Queue[Path] = queue.Queue()
        for number in range(WORKERS):
            (Path(folder) / str(number)).mkdir()
            checkouts.put(copied(Path(folder) / str(number)))

        def run(mutation: Mutation) -> str | None:
            checkout = checkouts.get()
            try:
                return planted(mutation, checkout)
            finally:
                checkouts.put(checkout)

        sound = checkouts.get()
        if outcome(sound, sorted({m.test for m in chosen})) != PASSED:
            console.print("[bold red]The tests fail without any bug planted: mend that first.")
            return 1
        checkouts.put(sound)
        with ThreadPoolExecutor(WORKERS) as pool:
            results = list(track(pool.map(run, chosen), "planting", len(chosen), console=console))
    for mutation, wrong in zip(chosen, results):
        mark = "[green]noticed[/]" if wrong is None else f"[bold red]{wrong}[/]"
        console.print(f"{mutation.name}: {mark}")
    survived = sum(wrong is not None for wrong in results)
    console.print(f"{len(chosen) - survived} of {len(chosen)} planted bugs noticed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
