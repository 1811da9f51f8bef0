"""A sampler from what a ledger says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpsgd.sampling.base import Sampler
from dpsgd.sampling.poisson import Poisson
from dpsgd.sampling.shuffled import Shuffled
from dpsgd.sampling.truncated import TruncatedPoisson
from dpsgd.sampling.users import UserPoisson


def described(description: Mapping[str, Any]) -> Sampler:
    """Returns a sampler, with a key of its own, of which `describe()` gave a description.

    Raises:
        ValueError: If there is no such sampler, or a value is missing or out of range.
    """
    values = dict(description)
    name = values.pop("sampler", None)
    if name == "shuffled":
        values["expected_batch_size"] = values.pop("batch_size", None)
    if isinstance(values.get("schedule"), Mapping):  # JSON has no numbers for keys
        values["schedule"] = {int(step): factor for step, factor in values["schedule"].items()}
    kinds = {
        "poisson": Poisson,
        "truncated_poisson": TruncatedPoisson,
        "shuffled": Shuffled,
        "user_poisson": UserPoisson,
    }
    if name not in kinds:
        raise ValueError(f"Expected a sampler out of {', '.join(kinds)}, got {name!r}.")
    try:
        return kinds[name](**values)
    except TypeError as error:
        raise ValueError(
            f"Expected the figures of a {name} sampler, got {sorted(values)}."
        ) from error
