"""`--help`."""

import re

import pytest
from command_line import command
from omegaconf import OmegaConf

from dpsgd.config import config_dir
from dpsgd.usage import help_of

NAMES = sorted(file.stem for file in config_dir().glob("*.yaml"))
GROUPS = [path for path in config_dir().iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_to_type_what_can_be_chosen_and_what_can_be_set(name):
    text = help_of(name)
    assert text.startswith(f"python -m dpsgd.{name}: ")
    assert text.index("Worth typing:") < text.index("Choices (") < text.index("Settings:")
    assert max(map(len, text.splitlines())) <= 110
    words = [line for line in text.splitlines() if line.startswith("  python -m dpsgd.")]
    assert len(words) >= 2


def test_every_choice_of_training_is_there_in_a_sentence():
    text = help_of("train")
    for group in GROUPS:
        for file in group.glob("*.yaml"):
            if group.name != "plan":
                assert re.search(rf"[* ] {group.name}={file.stem} +[A-Za-z0-9]", text), file


def test_the_defaults_are_marked():
    text = help_of("train")
    for entry in OmegaConf.load(config_dir() / "train.yaml").defaults:
        if not isinstance(entry, str):
            ((group, chosen),) = entry.items()
            if not group.startswith(("override", "optional")):
                assert f"* {group}={chosen}" in text


def test_settings_have_their_comments():
    assert "target_epsilon: 3.0  # calibrates the noise" in help_of("train")
    assert "and those of python -m dpsgd.train" in help_of("audit")


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_the_command_prints_it_and_runs_nothing(word, tmp_path):
    done = command("model=mlp", word, cwd=tmp_path)
    assert done.stdout.strip() == help_of("train")
    assert list(tmp_path.iterdir()) == []
