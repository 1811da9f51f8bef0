"""The rows in memory at once, found by trial on made-up records."""

import json
import math

import pytest
import shims
import torch
import worlds
from command_line import command

from dpsgd import engines, physical_batch
from dpsgd.physical_batch import Memory, first_rows, largest_fitting, most_rows, settle
from dpsgd.plan import PrivacyPlan
from dpsgd.private_step import PrivateStep
from dpsgd.sampling import Poisson


class Machine:
    """Memory for so many bytes: a batch takes a fixed part and as much for each row."""

    def __init__(self, size, row=10.0, fixed=0.0, kills=True):
        self.size, self.row, self.fixed, self.kills = size, row, fixed, kills
        self.tried, self.peak = [], 0.0

    def trial(self, rows):
        self.tried.append(rows)
        need = self.fixed + self.row * rows
        if need > self.size:
            assert not self.kills, "the process was killed"
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.peak = max(self.peak, need)

    @property
    def memory(self):
        return Memory(self.size if self.kills else math.inf, lambda: self.peak)


def test_rows_are_doubled_until_memory_runs_out():
    machine = Machine(1000, kills=False)
    assert largest_fitting(machine.trial, 1 << 20, machine.memory) == 64
    assert machine.tried == [1, 2, 4, 8, 16, 32, 64, 128]


@pytest.mark.parametrize("fixed", [0.0, 300.0])
@pytest.mark.parametrize("size", [900, 1000, 1300, 5000, 10**6])
def test_a_host_is_never_asked_for_more_than_it_has(size, fixed):
    machine = Machine(size, fixed=fixed)
    rows = largest_fitting(machine.trial, 1 << 30, machine.memory)
    assert rows == machine.tried[-1]
    assert size / 4 < fixed + 10 * rows + 300, "and what it has is used"


def test_growth_that_speeds_up_is_foreseen():
    """A term that grows with the square of the rows, small at first."""

    class Squares(Machine):
        def trial(self, rows):
            self.tried.append(rows)
            self.peak = max(self.peak, 500 + rows**2)
            assert self.peak <= self.size, "the process was killed"

    machine = Squares(6000)
    assert largest_fitting(machine.trial, 1 << 20, machine.memory) >= 16


def test_no_more_rows_than_wanted_are_tried():
    machine = Machine(10**9)
    assert largest_fitting(machine.trial, 16, machine.memory) == 16
    assert max(machine.tried) == 16


def test_not_even_one_row():
    machine = Machine(5, kills=False)
    with pytest.raises(ValueError, match=r"not even one row fits.*activation_checkpointing"):
        largest_fitting(machine.trial, 16, machine.memory)


def test_other_errors_are_not_hidden():
    def broken(rows):
        raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="ideas"):
        largest_fitting(broken, 16, Memory(math.inf, lambda: 0.0))


@pytest.mark.parametrize(
    ("rate", "size", "rows"), [(1.0, 1437, 2048), (0.5, 128, 64), (0.01, 6500, 128), (1e-3, 9, 1)]
)
def test_the_bound_is_public(rate, size, rows):
    sampler = Poisson(sample_rate=rate, public_size=size)
    plan = PrivacyPlan.make(
        sampler, worlds.clipping.Flat(1.0), num_steps=2, target_delta=1e-5, noise_multiplier=2.0
    )
    assert most_rows(plan) == rows


@pytest.mark.parametrize("asked", [0, -1, 2.5, True, None, "many", "-3", [4]])
def test_what_is_neither_a_size_nor_auto(asked):
    with pytest.raises(ValueError, match="physical_batch_size >= 1, a whole number, or auto"):
        first_rows(asked)


@pytest.mark.parametrize(("asked", "rows"), [(7, 7), ("7", 7), ("auto", 1)])
def test_what_is(asked, rows):
    assert first_rows(asked) == rows


@pytest.fixture
def memory_for(monkeypatch):
    accumulate = PrivateStep.accumulate

    def limit(most, tried):
        def accumulating(self, batch, mask=None):
            tried.append(batch[0])
            if len(batch[0]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return accumulate(self, batch, mask)

        monkeypatch.setattr(PrivateStep, "accumulate", accumulating)

    return limit


def test_a_trainer_takes_what_fits(memory_for):
    trainer, noise = worlds.trainer(worlds.vectors, engines.Ghost, torch.float32, physical=1)
    memory_for(5, [])
    (note,) = settle(trainer, "auto")
    assert trainer.physical_batch_size == 4
    assert "4 rows" in note
    assert trainer.step.engine.choices.final
    assert trainer.step.step == 0
    assert not noise.released
    assert len(list(trainer.run())) == 1


def test_no_record_is_used_in_trials(memory_for):
    """Whatever the records hold, and however many there are: the same trials."""
    seen = []
    for extra in ((), [(torch.full((6,), 1e30), torch.tensor(3))] * 9):
        trainer, _ = worlds.trainer(worlds.vectors, engines.Hooks, torch.float32, extra, physical=1)
        tried = []
        memory_for(99, tried)
        settle(trainer, "auto")
        seen.append((trainer.physical_batch_size, torch.cat(tried)))
    (one, tried), (other, again) = seen
    assert one == other == 16
    assert torch.equal(tried, again)


def test_what_optimizer_and_noise_need_is_left(monkeypatch):
    trainer, _ = worlds.trainer(worlds.vectors, engines.Hooks, torch.float32, physical=1)
    monkeypatch.setattr(physical_batch, "free_memory", lambda **limits: 1000.0)
    settle(trainer, "auto")
    assert trainer.physical_batch_size == 1, "nothing is left for a second row"


SHORT = (
    "model=mlp", "device=cpu", "accountant=rdp", "trainer.num_steps=4", "run.dir=r",
    "privacy.noise_multiplier=5", "sampler.sample_rate=0.1", "trainer.physical_batch_size=auto",
    "privacy.key='" + "ab" * 32 + "'",
)  # fmt: skip


def weights(folder):
    return (folder / "r" / "model.safetensors").read_bytes()


def test_the_command_line_finds_it(tmp_path):
    done = command(*SHORT, cwd=tmp_path)
    assert "Physical batches have 256 rows" in " ".join(done.stdout.split())
    assert "physical_batch_size: auto" in (tmp_path / "r" / "config.yaml").read_text()


def test_a_run_that_goes_on_keeps_what_was_found(tmp_path):
    """Even if more would fit now: the weights are those of a run without a break."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    little = shims.MEMORY.format(most=40)
    for folder in (whole, cut):
        folder.mkdir()
    done = command(*SHORT, cwd=whole, before=little)
    assert "Physical batches have 32 rows" in " ".join(done.stdout.split())
    kills = little + (
        "\nimport os\nfrom dpsgd.private_step import PrivateStep as P\n_release = P.release\n"
        "def release(self):\n    os._exit(9) if self.step == 2 else _release(self)\n"
        "P.release = release\n"
    )
    command(*SHORT, "checkpoint.every=1", cwd=cut, before=kills, check=False)
    done = command(*SHORT, "checkpoint.every=1", cwd=cut)
    assert "exactly where it was" in done.stdout
    assert weights(cut) == weights(whole)
    assert json.loads((cut / "r" / "report.json").read_text())["steps"] == 4
