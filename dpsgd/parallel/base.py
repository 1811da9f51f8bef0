"""How the processes of a job make one sum of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dpsgd.engines import Engine
from dpsgd.engines.grads import Groups, PerSampleGrads
from dpsgd.parallel.world import World

Parameters = Mapping[str, nn.Parameter]


class Parallel(ABC):
    """Holds the sum of a step and makes the sum over all processes of it.

    Each process takes its share of the units that a step drew (`share`). Sums are added up, never
    averaged: the divisor is the public expected batch size. What a process releases after that
    gets its noise by the place that it has among all coordinates, so every coordinate gets the
    same noise, once, whatever the number of processes.

    One object serves one `PrivateStep`.

    Attributes:
        world: The processes.
        even: Whether all processes must make as many passes over the model.
        mesh: What the parameters are sharded over, a `DeviceMesh`; None if they are not.
    """

    even: bool = False

    def __init__(self, world: World) -> None:
        self.world = world
        self.mesh: Any = None
        self._claimed = False
        self._sums: dict[str, Tensor] = {}

    def claim(self) -> None:
        """Makes this the way of one `PrivateStep`.

        Raises:
            ValueError: If it is that of another one, whose sums it would mix with.
        """
        if self._claimed:
            raise ValueError(
                "Expected one way of parallelism for each PrivateStep, got one that another step "
                "has. Make a new one, dpsgd.parallel.ddp() for example."
            )
        self._claimed = True

    def share(self, drawn: Tensor) -> Tensor:
        """Returns this process's share of the units of a step.

        Every process knows the whole draw, a function of the key and the step; they deal it out in
        turn, so that shares differ by one unit at most.

        Args:
            drawn: Positions of the units, [n] ascending, the same in all processes.
        """
        return drawn[self.world.rank :: self.world.size]

    @abstractmethod
    def place(self, engine: Engine) -> None:
        """Brings the engine's model into the form in which it is trained, once, in place.

        Raises:
            ValueError: If it has no such form, or the engine cannot work with it.
        """

    @abstractmethod
    def check(self, engine: Engine) -> None:
        """Raises unless a model is in that form, in all processes alike.

        Raises:
            ValueError: Naming what is not.
        """

    @property
    def pending(self) -> bool:
        """Whether something has been added since the last total."""
        return bool(self._sums)

    def discard(self) -> None:
        """Forgets what was added."""
        self._sums = {}

    @abstractmethod
    def add(
        self, grads: PerSampleGrads, weights: Tensor, groups: Groups, parameters: Parameters
    ) -> None:
        """Adds the weighted sum of a physical batch.

        Args:
            grads: Its per-sample gradients.
            weights: One per sample and group, [B, K].
            groups: The groups.
            parameters: The trainable parameters.
        """

    @abstractmethod
    def total(self, parameters: Parameters) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Returns the sum over all processes, this one's part of it, and ends the step.

        Returns:
            A tensor for each parameter, float32 or better, and the place of its first coordinate
            among the coordinates of all parameters.

        Raises:
            ValueError: If the parameters are not those of the sums; nothing is left of these.
        """

    @abstractmethod
    def gradient(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """Returns a part of a total as a gradient of the parameter."""

    @abstractmethod
    def weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Returns the whole weights of a sharded model on the CPU; None if the model holds them.

        A collective call; only the process that leads gets them.
        """

    @abstractmethod
    def settle(self, model: nn.Module) -> None:
        """Brings a model back into the form in which it is trained, after it was used otherwise."""


def positions(parameters: Parameters) -> dict[str, int]:
    """Returns the place of each parameter's first coordinate among those of all parameters."""
    places, at = {}, 0
    for name, p in parameters.items():
        places[name] = at
        at += p.numel()
    return places


def check_same(sums: Mapping[str, Tensor], parameters: Parameters) -> None:
    """Raises for sums that are not of these parameters; no sums are of any.

    Raises:
        ValueError: If a parameter was frozen or unfrozen within a step.
    """
    if sums and sums.keys() != parameters.keys():
        raise ValueError(
            "Expected the same trainable parameters from accumulate() to release(), but some "
            "were frozen or unfrozen in between. The step's sums are discarded; no "
            "noise was spent."
        )
