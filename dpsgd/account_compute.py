"""`python -m dpsgd.account plan=compute`: which batch size and how many steps, before any data."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from dpsgd import accounting, rng
from dpsgd.account_chart import save_choices, written
from dpsgd.accounting.batch_choice import LOSS, BatchChoice
from dpsgd.clipping import Clipping
from dpsgd.components import finished
from dpsgd.plan import PrivacyPlan
from dpsgd.planning import check_rate_is_free
from dpsgd.sampling import Sampler

_ANY_RATE = 1e-9
_NOT_REPEATED = ("plan", "account.", "debug")


def compare_batches(
    config: DictConfig, sampler: Any, clipping: Clipping, console: Console, typed: Sequence[str]
) -> PrivacyPlan:
    """Prints what each batch size costs within the compute budget, and returns the best plan.

    Args:
        config: A resolved configuration with `plan=compute`.
        sampler: Its sampler, a partial function of key and rate.
        clipping: Its clipping policy.
        console: Where the table goes.
        typed: What the user typed, to repeat it in the command that trains so.

    Raises:
        ValueError: If the configuration decides what is to be chosen, or a value is out of range.
    """
    _check_open(config)
    made = finished("sampler", sampler, Sampler, key=rng.fresh_key(), sample_rate=_ANY_RATE)
    check_rate_is_free(made, "compare batch sizes")
    if made.public_size is None:
        raise ValueError("Expected a declared public_size of the data, got none.")
    with console.status("calibrating the noise of each batch size"):
        choices = accounting.batch_choices(
            public_size=made.public_size,
            epochs=config.plan.epochs,
            target_epsilon=config.privacy.target_epsilon,
            delta=config.privacy.target_delta,
            accountant=config.accountant.name,
            adjacency=config.privacy.adjacency,
            max_batch_size=config.plan.max_batch_size,
        )
        best = accounting.recommended(choices)
        plan = PrivacyPlan(
            replace(made, sample_rate=None, expected_batch_size=best.expected_batch_size),
            clipping,
            best.num_steps,
            best.noise_multiplier,
            config.privacy.target_delta,
            config.privacy.adjacency,
            config.accountant.name,
        )
    console.print(_table(choices, best, plan, config))
    console.print(_reason(choices, best, config.plan.max_batch_size), highlight=False)
    console.print(_command(best, config, typed), highlight=False, soft_wrap=True)
    if config.account.plot is not None:
        path = Path(config.account.plot)
        with written(path):
            save_choices(choices, best, clipping.sensitivity, made.unit, path)
        console.print(f"drawn in {path}")
    return plan


def _check_open(config: DictConfig) -> None:
    """Raises if the configuration decides what plan=compute is to choose."""
    decided = {
        "privacy.noise_multiplier": config.privacy.noise_multiplier,
        "privacy.noise_schedule": config.privacy.noise_schedule,
        "trainer.num_steps": config.trainer.num_steps,
        "trainer.epochs": config.trainer.epochs,
        "sampler.sample_rate": config.sampler.sample_rate,
        "sampler.expected_batch_size": config.sampler.expected_batch_size,
        "account.solve": config.account.solve,
    }
    given = [f"{name}={value}" for name, value in decided.items() if value is not None]
    if given:
        raise ValueError(
            f"Expected plan=compute to choose noise, steps and batch size, got {', '.join(given)}. "
            "Leave it out; plan.epochs and plan.max_batch_size bound the choice."
        )
    for name in ("privacy.target_epsilon", "plan.epochs"):
        section, key = name.split(".")
        if config[section][key] is None:
            raise ValueError(f"Expected {name} for plan=compute, got null.")


def _table(
    choices: Sequence[BatchChoice], best: BatchChoice, plan: PrivacyPlan, config: DictConfig
) -> Table:
    most = max(choice.signal_to_noise for choice in choices)
    scale = plan.clipping.sensitivity
    guarantee = (
        f"epsilon {config.privacy.target_epsilon:g}, delta {plan.target_delta:g} "
        f"({accounting.neighbouring(plan.adjacency, plan.sampler.unit)}, {plan.accountant.upper()})"
    )
    table = Table(
        title=f"dpsgd: {config.plan.epochs:g} epochs of {plan.sampler.public_size} "
        f"{plan.sampler.unit}s at {guarantee}",
        title_justify="left",
        caption="noise: its standard deviation per coordinate, of one update and of the mean of "
        "all; signal: q / sigma sqrt(T / 2), of the best one's",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    headers = ("batch", "rate", "steps", "multiplier", "noise", "of the mean", "signal", "")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for choice in choices:
        table.add_row(
            f"{choice.expected_batch_size:.0f}",
            f"{choice.sample_rate:.3g}",
            str(choice.num_steps),
            f"{choice.noise_multiplier:.3f}",
            f"{choice.noise_of_one_update * scale:.3g}",
            f"{choice.noise_of_their_mean * scale:.3g}",
            f"{choice.signal_to_noise / most:.0%}",
            "recommended" if choice is best else "",
            style="bold green" if choice is best else None,
        )
    return table


def _reason(choices: Sequence[BatchChoice], best: BatchChoice, limit: int | None) -> str:
    """Why this one, in words."""
    words = (
        f"Recommended: the smallest batch whose signal to noise is within {LOSS:.0%} of the best "
        "one's. A larger one takes fewer steps for little less noise."
    )
    if best is choices[0] and len(choices) > 1:
        words += " A smaller one may do as well: the noise is not what limits this budget."
    if limit is not None and choices[-1].noise_multiplier < 1:
        words += (
            " All of these batches are small for this budget: a larger plan.max_batch_size, or "
            "fewer epochs, would need less noise for its steps."
        )
    return words


def _command(best: BatchChoice, config: DictConfig, typed: Sequence[str]) -> str:
    """The command that trains so."""
    target, repeated = "privacy.target_epsilon=", []
    for word in typed:
        if not word.lstrip("+~").startswith((*_NOT_REPEATED, target)):
            repeated.append(shlex.quote(word))
    chosen = [
        f"sampler.expected_batch_size={best.expected_batch_size:.0f}",
        f"trainer.num_steps={best.num_steps}",
        f"{target}{config.privacy.target_epsilon:g}",
    ]
    return " ".join(["python -m dpsgd.train", *repeated, *chosen])
