"""What `--help` shows: commands worth typing, choices in a sentence each, settings."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from dpsgd.config import config_dir

_OWN = "hydra", "defaults"
_WIDTH = 100
_FOOT = """Choices are typed as NAME=OPTION, settings as NAME=VALUE; of a choice, as model.pool=2.
  python -m dpsgd.{name} --cfg job      every setting of a command, without running it
  python -m dpsgd.{name} --hydra-help   what else Hydra can do
Pages with examples: docs/quickstart.md, docs/configuration.md, docs/troubleshooting.md."""


def help_of(name: str) -> str:
    """Returns the help of an entry point.

    Args:
        name: Name of its configuration file, `train` for example.
    """
    *below, own = _files(name)
    header = OmegaConf.load(own).hydra.help.header.strip()
    parts = [header, "Choices (* is taken if none is named):"]
    parts += [_group(group, chosen) for group, chosen in _groups([own, *below])]
    parts += ["Settings:", _settings(own.read_text(encoding="utf-8"))]
    parts += [f"  and those of python -m dpsgd.{file.stem} --help" for file in below]
    return "\n\n".join([*parts, _FOOT.format(name=name)])


def _files(name: str) -> Iterator[Path]:
    """The configuration file of an entry point, after the one that it builds on."""
    file = config_dir() / f"{name}.yaml"
    for entry in OmegaConf.load(file).defaults:
        if isinstance(entry, str) and (config_dir() / f"{entry}.yaml").is_file():
            yield from _files(entry)
    yield file


def _groups(files: list[Path]) -> Iterator[tuple[str, str | None]]:
    """The groups of an entry point, each with the option that is taken."""
    seen = set()
    for file in files:
        for entry in OmegaConf.load(file).defaults:
            if isinstance(entry, str):
                continue
            ((key, chosen),) = entry.items()
            group = key.removeprefix("optional ")
            if not key.startswith("override ") and group not in seen:
                seen.add(group)
                yield group, chosen


def _group(group: str, chosen: str | None) -> str:
    """A group and its options, each with the first sentence of its file."""
    options = sorted((config_dir() / group).glob("*.yaml"))
    width = max(len(file.stem) for file in options)
    lines = []
    for file in options:
        mark = "*" if file.stem == chosen else " "
        left = f"  {mark} {group}={file.stem:<{width}}  "
        room = _WIDTH - len(left)
        lines.append(left + textwrap.shorten(_sentence(file), room, placeholder="..."))
    return "\n".join(lines)


def _sentence(file: Path) -> str:
    """The first sentence of the comment at the head of a file, up to a colon."""
    lines = file.read_text(encoding="utf-8").splitlines()
    words = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    words = words.replace("@package _global_", "").strip()
    return re.split(r"[.:](?= |$)", words)[0]


def _settings(text: str) -> str:
    """The plain settings of a configuration file as they stand there, comments included."""
    kept, ours = [], False
    for line in text.splitlines():
        if re.match(r"\w+:", line):
            ours = line.partition(":")[0] not in _OWN
        if ours and line.strip():
            kept.append(f"  {line}")
    return "\n".join(kept)
