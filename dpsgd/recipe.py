"""What a trainer adds around the private step: views, learning rates, averaged weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpsgd.augmentation import Augmentation


@dataclass(frozen=True)
class Recipe:
    """What helps accuracy and changes nothing of what is accounted for.

    Attributes:
        augmentation: Makes the views of each sample; None takes the samples as they are. The loss
            is then a `dpsgd.losses.MeanOfViews`.
        rates: For each step what the optimizer's parameter groups are set to before it, {"lr": 0.1}
            (`dpsgd.learning_rates.tabulated`); empty leaves the optimizer alone.
        ema_decay: Tests and saves an exponential moving average of the weights with this decay
            (`dpsgd.averaging`); None takes the weights of the last step.

    Raises:
        ValueError: If the decay is outside [0, 1).
    """

    augmentation: Augmentation | None = None
    rates: Sequence[Mapping[str, Any]] = ()
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        made = self.augmentation
        if made is not None and not isinstance(made, Augmentation):
            raise ValueError(
                f"Expected a dpsgd.augmentation.Augmentation, got {type(made).__name__}."
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"Expected 0 <= ema_decay < 1, or null for no average, got {self.ema_decay}."
            )


PLAIN = Recipe()
"""Nothing is added."""
