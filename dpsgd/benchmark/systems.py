"""The systems that are measured: one whole training step each, private or not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dpsgd.checks import synthetic_batch
from dpsgd.components import build
from dpsgd.config import placement
from dpsgd.engines import Batch, LossFn
from dpsgd.engines.memory import is_out_of_memory
from dpsgd.losses import MeanOfViews
from dpsgd.placement import Placement
from dpsgd.precision import with_autocast
from dpsgd.private_step import PrivateStep
from dpsgd.seeding import seed_everything

BASELINE = "non-private"

Step = Callable[[], object]
"""One whole training step on the batch in memory."""


@dataclass(frozen=True)
class System:
    """A system by its name and settings: plain data that another process can read.

    Attributes:
        name: As the tables show it.
        engine: The engine's section of the configuration; None for ordinary training.
        model: Settings of the model that this system needs otherwise (replaced layers).
        compile: Whether ordinary training is compiled with `torch.compile`.
    """

    name: str
    engine: Mapping[str, Any] | None
    model: Mapping[str, Any] = field(default_factory=dict)
    compile: bool = False


def expand(entries: Sequence[Any], variants: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns (engine, options) of every system that the entries of `bench.engines` stand for.

    Args:
        entries: Names of engine configs, or `{name: options}` each.
        variants: The options, a list of mappings, that a bare name stands for; none by default.

    Raises:
        ValueError: If there is no entry, or one has another form.
    """
    expanded: list[tuple[str, dict[str, Any]]] = []
    for entry in entries:
        if isinstance(entry, str):
            expanded += [(entry, dict(options)) for options in variants.get(entry, [{}])]
        elif isinstance(entry, Mapping) and len(entry) == 1:
            ((name, options),) = entry.items()
            if not isinstance(options, Mapping):
                raise ValueError(
                    f"Expected options of '{name}' as {{option: value}}, got {options!r}."
                )
            expanded.append((str(name), dict(options)))
        else:
            raise ValueError(
                f"Expected names or {{name: {{option: value}}}} in bench.engines, got {entry!r}."
            )
    if not expanded:
        raise ValueError("Expected at least one engine in bench.engines, got none.")
    return expanded


def label(engine: str, options: Mapping[str, Any]) -> str:
    """Returns a system's name: `opacus-ghost`, `vmap-compile`, `vmap-chunk_size=16`."""
    words = [engine]
    for key, value in options.items():
        if isinstance(value, str):
            words.append(value)
        else:
            words.append(key if value is True else f"{key}={value}")
    return "-".join(words)


@dataclass(frozen=True, eq=False)
class Workload:
    """What all systems share: initial weights, loss, batch, and how a step is made private.

    Attributes:
        config: The composed configuration, interpolations resolved.
        model: The model with its initial weights; every system gets a copy.
        loss_fn: One loss per sample.
        batch: A made-up batch of the declared shapes, on the device.
        place: Device and dtype.
    """

    config: DictConfig
    model: nn.Module
    loss_fn: LossFn
    batch: Batch
    place: Placement

    @classmethod
    def from_config(cls, config: DictConfig) -> Workload:
        """Builds the workload; the same configuration gives the same weights in every process.

        Raises:
            ValueError: If a component cannot be built, or the model does not fit the data.
        """
        torch.set_float32_matmul_precision("highest")
        place = placement(config)
        seed_everything(config.seed)
        parts = build(config, ("data", "model", "loss", "augmentation"))
        model = place.model(parts["model"])
        batch = synthetic_batch(parts["data"], config.bench.batch_size, padded=False)
        loss_fn = with_autocast(parts["loss"], config.autocast, place.dtype)
        if parts["augmentation"] is not None:
            batch = parts["augmentation"](batch, 0, 0, torch.arange(len(batch[0])))
            loss_fn = MeanOfViews(loss_fn)
        resolved = config.copy()
        OmegaConf.resolve(resolved)
        resolved.privacy.key = None  # noise takes fresh keys here; none is written anywhere
        return cls(resolved, model, loss_fn, place.batch(batch), place)

    def step(self, system: System) -> Step:
        """Returns the training step of a system, on a copy of the model of its own.

        Raises:
            ValueError: If the settings are unsound or the engine refuses the model.
        """
        model = self._model(system)
        if system.engine is None:
            return self._ordinary_step(model, system.compile)
        step = self._private_step(system.engine, model)
        return lambda: step(self.batch)

    def _model(self, system: System) -> nn.Module:
        """A copy of the model, or another one if the system asks for it."""
        if not system.model:
            return copy.deepcopy(self.model)
        config = OmegaConf.create({**self.config, "model": {**self.config.model, **system.model}})
        seed_everything(config.seed)
        return self.place.model(build(config, ("data", "model"))["model"])

    def check(self, systems: Sequence[System]) -> None:
        """Raises for mistakes in the settings: they are no engine's refusal of the model.

        Each engine is set up on a model that none can refuse, and ordinary training takes a step.

        Raises:
            ValueError: If an option of an engine, or a setting that all share, is unsound.
        """
        for system in systems:
            if system.engine is not None:
                try:
                    self._private_step(system.engine, nn.Linear(1, 1))
                except ValueError as error:
                    raise ValueError(f"Cannot set up {system.name}: {error}") from error
        self.step(System(BASELINE, None))()

    def _private_step(self, engine: Mapping[str, Any], model: nn.Module) -> PrivateStep:
        config = OmegaConf.create({**self.config, "engine": dict(engine)})
        parts = build(config, ("engine", "clipping", "noise"))
        return PrivateStep(
            parts["engine"](model, self.loss_fn),
            self._optimizer(model),
            clipping=parts["clipping"],
            noise=parts["noise"](),
            noise_multiplier=self.config.privacy.noise_multiplier,
            expected_batch_size=self.config.bench.batch_size,
        )

    def _ordinary_step(self, model: nn.Module, compile: bool) -> Step:
        optimizer = self._optimizer(model)

        def forward() -> Tensor:
            return self.loss_fn(model, self.batch).mean()

        loss = torch.compile(forward) if compile else forward

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            optimizer.step()

        return step

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return build(self.config, ("optimizer",))["optimizer"](parameters)


def failure(error: Exception) -> str | None:
    """Returns why a system cannot run, None if the error is a mistake in the code."""
    if isinstance(error, ValueError):
        return str(error)
    words = str(error)
    if is_out_of_memory(error):
        return f"Out of memory: {words.splitlines()[0]}"
    if "InvalidCxxCompiler" in words:
        return "No C++ compiler works here (set CXX, or install g++)."
    return None
