"""Recipes on the command line: they go together, what is saved is what was tested, runs resume."""

import json
import math
import signal

import pytest
import runs
from command_line import Running, command

from dpsgd import load_run
from dpsgd.data import digits
from dpsgd.evaluate import evaluate
from dpsgd.losses import cross_entropy

ALL = (
    "model=cnn", "model.channels=[4]", "model.groups=2", "model.weight_standardisation=true",
    "model.activation={scale:1.58,inverse_temperature:3.0,offset:0.71}",
    "augmentation=affine", "augmentation.multiplicity=2", "trainer.ema_decay=0.8",
    "schedule=cosine", "schedule.warmup=0.3", "clipping=unit_norm", "clipping.max_grad_norm=0.1",
    "sampler.schedule={0:0.5,4:1.0}",
)  # fmt: skip
WORDS = [word for word in runs.SHORT if not word.startswith(("model", "clipping"))]
RATE = "optimizer/learning_rate"
KILLED = """
import os
from dpsgd.private_step import PrivateStep
_release = PrivateStep.release
def release(self):
    _release(self)
    if self.step == 5:
        os.kill(os.getpid(), {sent})
PrivateStep.release = release
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    command(*WORDS, *ALL, cwd=folder)
    return folder


def test_what_is_saved_is_what_was_tested(whole):
    """The average, not the last weights: the report's figures are those of the file."""
    model, config, report = load_run(whole / "r")
    data = digits(mean=config.data.mean, std=config.data.std)
    found = evaluate(model, cross_entropy, data)
    assert found["test_accuracy"] == report["test"]["test_accuracy"]
    assert found["test_loss"] == pytest.approx(report["test"]["test_loss"], rel=1e-6)


def test_the_report_says_what_was_added(whole):
    report = load_run(whole / "r").report
    assert report["ema_decay"] == 0.8
    assert "multiplicity=2" in report["views"]


def test_the_learning_rates_are_those_of_the_schedule(whole):
    lines = [json.loads(line) for line in (whole / "r" / "metrics.jsonl").read_text().splitlines()]
    rates = [line[RATE] for line in lines if RATE in line]
    falling = [(1 + math.cos(t * math.pi / 5)) / 2 for t in range(5)]
    assert rates == pytest.approx([0.2 * rate for rate in (0.5, 1.0, *falling)])


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_with_all_of_them_goes_on_bit_for_bit(sent, whole, tmp_path):
    words = (*WORDS, *ALL)
    Running(*words, cwd=tmp_path, before=KILLED.format(sent=int(sent))).wait()
    command("resume=r", cwd=tmp_path)
    assert runs.model(tmp_path) == runs.model(whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.ema_decay=1.5"], "ema_decay"),
        (["augmentation=crop_flip", "augmentation.padding=8"], "augmentation.padding"),
        (["augmentation=affine", "augmentation.multiplicity=0"], "multiplicity"),
        (["schedule=cosine", "schedule.least=3"], "schedule.least"),
        (["schedule=milestones", "schedule.at=[2]"], "schedule.at"),
        (["schedule=milestones", "schedule.at=3"], "schedule.at as a list"),
        (["model.trainable=nothing"], "model.trainable"),
        (["model.activation={scale:1}"], "tempered sigmoid"),
        (["model=wide_resnet", "model.weight_standardisation=3"], "weight_standardisation"),
        (["augmentation=affine", "model=lstm", "data=synthetic", "data.kind=tokens",
          "data.input_shape=[9]", "data.vocab_size=7"], "augmentation=none"),
    ],
)  # fmt: skip
def test_bad_settings_give_one_message(words, said, tmp_path):
    done = command(*words, "trainer.num_steps=2", "device=cpu", cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
