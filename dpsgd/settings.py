"""The typed scalars of a configuration: what Hydra checks before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Privacy:
    """`privacy.*`."""

    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    target_delta: float = 1e-5
    adjacency: str = "add_remove"
    noise_schedule: Any = None
    key: str | None = None


@dataclass
class Training:
    """`trainer.*`."""

    num_steps: int | None = None
    epochs: float | None = None
    physical_batch_size: Any = 512
    activation_checkpointing: bool = False
    evaluate_every: int = 10
    ema_decay: float | None = None


@dataclass
class Logging:
    """`logger.*`."""

    diagnostics: bool = False


@dataclass
class Accountant:
    """`accountant.*`."""

    name: str = "pld"


@dataclass
class Run:
    """`run.*`."""

    dir: str = "runs"


@dataclass
class Checkpointing:
    """`checkpoint.*`."""

    every: int | None = 20
    allow_new_data: bool = False


@dataclass
class Bench:
    """`bench.*`."""

    engines: list[Any] = field(default_factory=list)
    variants: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 256
    repetitions: int = 9
    warmup: int = 2
    max_seconds: float = 60.0
    memory: bool = True
    sweep: Any = None
    dir: str = "runs"


@dataclass
class Audit:
    """`audit.*`."""

    runs: int = 500
    steps: int = 60
    canaries: int = 100
    confidence: float = 0.99
    minutes: float = 6.0
    dir: str = "runs"


@dataclass
class Pretraining:
    """`pretrain.*`."""

    num_steps: int = 600
    batch_size: int = 128


@dataclass
class Sweep:
    """`sweep.*`."""

    kind: str = "grid"
    over: Any = None
    mean: float = 1.0
    shape: float = 0.0


@dataclass
class Plan:
    """`plan.*`."""

    kind: str = "none"
    epochs: float | None = None
    max_batch_size: int | None = None


@dataclass
class Account:
    """`account.*`."""

    solve: str | None = None
    plot: str | None = None


@dataclass
class Scalars:
    """The top-level scalars."""

    device: str = "auto"
    dtype: str = "float32"
    autocast: str | None = None
    seed: int = 0
    debug: bool = False
    ledger: str | None = None
    resume: str | None = None


SECTIONS: dict[str, type] = {
    "privacy": Privacy,
    "trainer": Training,
    "logger": Logging,
    "accountant": Accountant,
    "account": Account,
    "plan": Plan,
    "audit": Audit,
    "pretrain": Pretraining,
    "sweep": Sweep,
    "run": Run,
    "checkpoint": Checkpointing,
    "bench": Bench,
}
"""Sections of plain settings, by name."""

COMPONENTS = (
    "data",
    "model",
    "loss",
    "engine",
    "clipping",
    "noise",
    "sampler",
    "optimizer",
    "schedule",
    "augmentation",
    "parallel",
)
"""Sections that name a `_target_` to build, in the order of building."""
