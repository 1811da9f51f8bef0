"""Public pre-training and private fine-tuning, on the command line."""

import pytest
from command_line import command

from dpsgd import load_run

SMALL = (
    "data.public_size=300",
    "data.num_test=100",
    "model=mlp",
    "model.widths=[16]",
    "device=cpu",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("public")
    done = command(
        *SMALL, "pretrain.num_steps=150", "run.dir=pub", module="dpsgd.pretrain", cwd=path
    )
    assert "NOT PRIVATE" in done.stdout
    assert "model.init_from=pub/model.safetensors" in done.stdout
    return path


def test_private_training_starts_where_pre_training_ended(folder):
    """One step with a rate of nothing leaves the weights: much better than chance on digits."""
    start = ("model.init_from=pub/model.safetensors", "trainer.num_steps=1", "optimizer.lr=1e-9")
    command("model=mlp", "model.widths=[16]", "device=cpu", *start, "run.dir=r", cwd=folder)
    assert load_run(folder / "r").report["test"]["test_accuracy"] > 0.3


def test_it_does_not_write_over_a_run(folder):
    done = command(*SMALL, "run.dir=pub", module="dpsgd.pretrain", cwd=folder, check=False)
    assert done.returncode == 2
    assert "new run.dir" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("pretrain.num_steps=0", "run.dir=x"), "pretrain.num_steps"),
        (("pretrain.batch_size=none", "run.dir=x"), "pretrain.batch_size"),
        (("schedule.warmup=2", "run.dir=x"), "schedule.warmup"),
        (("run.dir=/proc/none/x",), "Cannot write"),
    ],
)
def test_bad_input_gives_one_message(words, said, tmp_path):
    done = command(*SMALL, *words, module="dpsgd.pretrain", cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
