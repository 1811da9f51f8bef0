"""The results: as plain data for JSON, and as a table."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from dpsgd import __version__
from dpsgd.benchmark.measurement import Measurement
from dpsgd.benchmark.systems import Workload


@dataclass(frozen=True, eq=False)
class Results:
    """All measurements of one workload.

    Attributes:
        workload: What was run.
        measurements: One per system, ordinary training first.
    """

    workload: Workload
    measurements: Sequence[Measurement]

    @property
    def baseline(self) -> Measurement:
        """Ordinary training."""
        return self.measurements[0]

    @property
    def title(self) -> str:
        """The workload in one line."""
        config, place = self.workload.config, self.workload.place
        model = type(self.workload.model).__name__
        threads = torch.get_num_threads()
        device = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        if place.device.type != "cpu":
            device = device_name(place.device)
        return f"{model}, {self.parameters:,} parameters, batch {config.bench.batch_size}, {device}"

    @property
    def method(self) -> str:
        """How medians and intervals were had, in one line."""
        intervals = [m.interval for m in self.measurements if m.interval is not None]
        counts = sorted({len(m.seconds) for m in self.measurements if m.seconds})
        steps = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
        least = min(interval.coverage for interval in intervals)
        return (
            f"Medians of {steps} interleaved steps; intervals cover the median with probability "
            f">= {least:.0%}"
        )

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.workload.model.parameters() if p.requires_grad)

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain data: measurements, circumstances and configuration."""
        place = self.workload.place
        return {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "title": self.title,
            "method": self.method,
            "baseline": self.baseline.name,
            "systems": [m.as_dict(self.baseline) for m in self.measurements],
            "parameters": self.parameters,
            "device": str(place.device),
            "device_name": device_name(place.device),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "versions": _versions(),
            "config": _without_key(self.workload.config),
        }


def table(results: Results) -> Table:
    """Returns the results as a table for the terminal."""
    shown = Table(
        title=f"dpsgd.bench: one training step of {results.title}",
        caption=f"{results.method}. Ratio: to the median of ordinary training. Peak: memory beyond "
        "what the process held before its first step.",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("system", style="bold", no_wrap=True)
    for heading in ("median ms", "interval", "ratio", "peak MiB"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("note")
    for m in results.measurements:
        shown.add_row(m.name, *_figures(m, results.baseline), note(m))
    return shown


def note(m: Measurement) -> str:
    """Returns the remark beside a row."""
    return f"refused: {m.refusal}" if m.refusal is not None else m.note


def _figures(m: Measurement, baseline: Measurement) -> list[str]:
    ratio, peak = m.ratio(baseline), m.memory
    memory = "-" if peak is None else f"{peak.peak_mib:.0f}"
    if m.median is None or m.interval is None or ratio is None:
        return ["-", "-", "-", memory]
    low, high = milliseconds(m.interval.low), milliseconds(m.interval.high)
    return [milliseconds(m.median), f"{low} - {high}", f"{ratio:.2f}", memory]


def milliseconds(seconds: float) -> str:
    """Returns a time with three digits or more, in ms without the unit."""
    value = 1000 * seconds
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def device_name(device: torch.device) -> str:
    """Returns what the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str | None]:
    try:
        opacus: str | None = version("opacus")
    except PackageNotFoundError:
        opacus = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opacus": opacus,
        "dpsgd": __version__,
    }


def _without_key(config: DictConfig) -> Any:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {
        **plain,
        "privacy": {name: value for name, value in plain["privacy"].items() if name != "key"},
    }
