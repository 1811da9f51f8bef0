"""Peak memory of a step, in a fresh process: `python -m dpsgd.benchmark.memory JOB RESULT`."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dpsgd.benchmark.measurement import Measurement, Memory
from dpsgd.benchmark.meters import Meter, meter_for, return_freed_memory
from dpsgd.benchmark.systems import Step, System, Workload, failure

_KILLED = "The process was killed, most likely for lack of memory."


def in_fresh_process(config: DictConfig, system: System) -> Measurement:
    """Returns the peak memory of a system, or why it does not run, measured in its own process.

    Args:
        config: The composed configuration, interpolations resolved.
        system: What to run.

    Raises:
        RuntimeError: If the process fails on a mistake in the code; it shows the traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write_text(
            json.dumps({"config": OmegaConf.to_container(config), "system": asdict(system)}),
            encoding="utf-8",
        )
        process = subprocess.run(
            [sys.executable, "-m", "dpsgd.benchmark.memory", str(job), str(result)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode < 0:
            return Measurement(system.name, refusal=_KILLED)
        if process.returncode > 0:
            raise RuntimeError(f"Measuring memory of {system.name} failed:\n{process.stderr}")
        found = json.loads(result.read_text(encoding="utf-8"))
    if found["refusal"] is not None:
        return Measurement(system.name, refusal=found["refusal"])
    return Measurement(system.name, memory=Memory(**found["memory"]))


def peak_memory(step: Step, meter: Meter, steps: int = 2) -> Memory:
    """Returns the peak memory of a step over what the process holds now.

    The first step is told apart: engines check themselves then, in ways that need more memory than
    training does. Peaks that cannot be reset (`ru_maxrss`) include it.

    Args:
        step: The step, not yet taken.
        meter: What reads the memory.
        steps: Steps to take after the first one.
    """
    return_freed_memory()
    before = meter.current()
    meter.reset()
    step()
    first = meter.peak()
    gc.collect()
    return_freed_memory()
    meter.reset()
    for _ in range(steps):
        step()
    return Memory(max(0.0, meter.peak() - before), max(0.0, first - before), meter.method)


def _measured(job: dict[str, Any]) -> dict[str, Any]:
    workload = Workload.from_config(OmegaConf.create(job["config"]))
    try:
        step = workload.step(System(**job["system"]))
        memory = peak_memory(step, meter_for(workload.place.device))
    except (ValueError, RuntimeError) as error:
        refusal = failure(error)
        if refusal is None:
            raise
        return {"refusal": refusal, "memory": None}
    return {"refusal": None, "memory": vars(memory)}


def main(arguments: list[str]) -> None:
    """Reads the job file, measures, and writes the result file."""
    job, result = map(Path, arguments)
    found = _measured(json.loads(job.read_text(encoding="utf-8")))
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
