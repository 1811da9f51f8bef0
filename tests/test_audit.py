"""`python -m dpsgd.audit`, through the real command line."""

import json
import subprocess
import sys

import pytest
from command_line import command, environment

SMALL = ("model=linear", "engine=vmap", "device=cpu", "trainer.num_steps=2", "audit.runs=60",
         "audit.canaries=20", "audit.dir=a", "seed=1")  # fmt: skip

KEYS = """
import hashlib, itertools
from dpsgd import rng
_made = (hashlib.sha256(b"key %d" % number).digest() for number in itertools.count())
rng.fresh_key = lambda: next(_made)
"""
"""Keys in their order: what an audit measures is the same in every run of the tests."""

HALF = (
    KEYS
    + """
import sys
from dpsgd.noise import Gaussian
original = Gaussian.add_
Gaussian.add_ = lambda self, sums, std, *rest: original(self, sums, std / 4, *rest)
from dpsgd.audit import main
sys.argv = ["audit", *sys.argv[1:]]
main()
"""
)


def audit(*arguments, cwd, check=True):
    return command(*SMALL, *arguments, cwd=cwd, module="dpsgd.audit", before=KEYS, check=check)


def test_an_honest_configuration_passes(tmp_path):
    out = audit(cwd=tmp_path).stdout
    for words in ("T1 sensitivity", "T2 noise law", "T3 sampler law", "T5 two worlds", "T6 one"):
        assert words in out
    assert "VIOLATED" not in out
    found = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert found["violated"] == []
    assert found["two_worlds"]["runs"] == 60
    assert (tmp_path / "a" / "tradeoff.png").stat().st_size > 10_000


def test_a_planted_bug_exits_non_zero(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HALF, *SMALL],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stderr
    assert "PRIVACY VIOLATED" in done.stdout
    assert json.loads((tmp_path / "a" / "audit.json").read_text())["violated"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("sampler=truncated_poisson", "privacy.noise_multiplier=1"),
        ("sampler=shuffled", "privacy.adjacency=replace_one"),
        ("data=synthetic", "data.num_users=50", "sampler=user_poisson", "sampler.public_size=50"),
        ("data=synthetic", "data.kind=tokens", "data.input_shape=[9]", "data.vocab_size=11",
         "model=transformer", "clipping=adaptive", "engine=ghost", "trainer.num_steps=1"),
    ],
    ids=lambda arguments: arguments[0].split("=")[1],
)  # fmt: skip
def test_other_configurations_pass(arguments, tmp_path):
    audit(*arguments, cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["audit.runs=3"], "runs >= 50"),
        (["audit.steps=0"], "steps >= 1"),
        (["audit.confidence=2"], "audit.confidence"),
        (["audit.minutes=0"], "audit.minutes"),
        (["audit.speed=9"], "no setting 'audit.speed'"),
    ],
)
def test_bad_input_gives_one_message(arguments, words, tmp_path):
    done = audit(*arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
