"""A run's configuration: where it comes from, and what the user's words decide in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpsgd.placement import Placement
from dpsgd.settings import COMPONENTS, SECTIONS, Scalars

EXCLUSIVE = (
    ("privacy.target_epsilon", "privacy.noise_multiplier"),
    ("trainer.num_steps", "trainer.epochs"),
    ("sampler.sample_rate", "sampler.expected_batch_size"),
)
"""Settings of which one decides the other: an explicit one unsets the other one's default."""

_KEPT_OF_TARGETS = {
    "optimizer": {"_target_", "_partial_", "lr"},
    "schedule": {"_target_", "_partial_"},
}
"""What stays of a component's settings where another `_target_` is typed, without its group."""


def config_dir() -> Path:
    """Returns the folder of the configs: inside the installed package, or of the checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def resolve(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Returns the configuration, typed, with settings that exclude each other decided.

    Args:
        config: The composed configuration.
        overrides: What the user typed, `key=value` each.

    Raises:
        ValueError: If a setting is unknown or of a wrong type, or two that exclude each other are
            both explicit.
    """
    config = _copy(config)
    typed = dict(typed_settings(overrides))
    solving = OmegaConf.select(config, "account.solve") is not None
    for pair in EXCLUSIVE[1:] if solving else EXCLUSIVE:  # to solve for steps takes both of these
        _decide(config, pair, typed)
    for name, kept in _KEPT_OF_TARGETS.items():
        if name in config and f"{name}._target_" in typed and name not in typed:
            for key in set(config[name]) - kept:
                if f"{name}.{key}" not in typed:
                    del config[name][key]
    return _checked(config)


def saved_settings(config: DictConfig) -> str:
    """Returns the configuration as YAML, interpolations resolved, without key and permissions."""
    copy = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    if copy.privacy.key is not None:
        copy.privacy.key = "<redacted>"
    copy.checkpoint.allow_new_data = False  # it is given for one command
    return OmegaConf.to_yaml(copy)


def fixed_key(config: DictConfig) -> bytes | None:
    """Returns the key fixed by `privacy.key`, 64 hexadecimal digits, None if it is not fixed.

    Raises:
        ValueError: If it is anything else. The message does not show it.
    """
    text = config.privacy.key
    if text is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError(
            "Expected privacy.key to be 64 hexadecimal digits (in quotes), or null for a fresh key."
        )
    return bytes.fromhex(text)


def placement(config: DictConfig) -> Placement:
    """Returns device and dtype of a configuration."""
    return Placement.from_names(config.device, config.dtype)


def _copy(config: DictConfig) -> DictConfig:
    copy = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    assert isinstance(copy, DictConfig)
    return copy


def _decide(config: DictConfig, pair: tuple[str, str], typed: dict[str, Any]) -> None:
    explicit = [key for key in pair if typed.get(key) is not None]
    if len(explicit) == 2:
        raise ValueError(f"{pair[0]} and {pair[1]} exclude each other, and both are set: set one.")
    if len(explicit) == 1:
        OmegaConf.update(config, pair[1 - pair.index(explicit[0])], None)
    elif all(OmegaConf.select(config, key) is not None for key in pair):
        raise ValueError(
            f"The configuration sets both {pair[0]} and {pair[1]}, which exclude each other. Set "
            "one of them to null."
        )


def _checked(config: DictConfig) -> DictConfig:
    """The configuration with its plain settings converted to their types."""
    scalars = OmegaConf.structured(Scalars)
    for key in list(config):
        if key in SECTIONS:
            config[key] = _merged(OmegaConf.structured(SECTIONS[key]), config[key], f"{key}.")
        elif key in scalars:
            scalars = _merged(scalars, OmegaConf.create({key: config[key]}), "")
            config[key] = scalars[key]
        elif key not in COMPONENTS:
            known = [*scalars, *SECTIONS, *COMPONENTS]
            raise ValueError(f"There is no setting '{key}'. Settings: {', '.join(known)}.")
    return config


def _merged(schema: DictConfig, section: DictConfig, prefix: str) -> Any:
    if prefix and not isinstance(section, DictConfig):
        known = ", ".join(prefix + str(key) for key in schema)
        raise ValueError(f"Expected the settings {known}, got {prefix[:-1]}={section!r}.")
    try:
        return OmegaConf.merge(schema, section)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        known = ", ".join(prefix + str(key) for key in schema)
        raise ValueError(
            f"Wrong setting {prefix}{error.key}: {reason}. Settings: {known}."
        ) from error


def typed_settings(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields (key, value) of each override; a dictionary as one pair per entry."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_delete():
            continue
        key, value = override.key_or_group, override.value()
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value
