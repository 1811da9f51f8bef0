"""How long noise takes beside PyTorch's generator, in turns; writes results.json beside it."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

from dpsgd.noise import Gaussian

COUNT = 1 << 21
REPETITIONS = 31


def main() -> None:
    """Measures and writes medians in milliseconds, and their ratio."""
    noise, sums = Gaussian(), {"sums": torch.zeros(COUNT)}
    times: dict[str, list[float]] = {"randn": [], "noise": []}
    for step in range(REPETITIONS + 3):
        for name in times:
            start = time.perf_counter()
            torch.randn(COUNT) if name == "randn" else noise.add_(sums, 1.0, step)
            if step >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    report = {
        "what": f"{COUNT} float32 normals, milliseconds; noise: drawn and added to sums",
        **medians,
        "ratio": medians["noise"] / medians["randn"],
        "repetitions": REPETITIONS,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    text = json.dumps(report, indent=2)
    Path(__file__).with_name("results.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
