"""Every file of a run, cut at many lengths and with flipped bits: nothing damaged is loaded."""

import random
import shutil
from pathlib import Path

import pytest
import runs
import torch

import dpsgd
from dpsgd import ledger
from dpsgd.checkpoint import Checkpoint, Checkpoints
from dpsgd.run_directory import RunDirectory, read_report

KEY = bytes(range(32))
QUICK, MANY = 40, 2000


def damaged(whole, count, seed=0):
    """Cut and flipped versions of some bytes."""
    lots = random.Random(seed)
    for number in range(count):
        if number % 4 == 0:
            yield whole[: lots.randrange(len(whole))]
        else:
            place, bit = lots.randrange(len(whole)), 1 << lots.randrange(8)
            yield whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :]


COUNTS = [QUICK, pytest.param(MANY, marks=pytest.mark.faults)]


def state(number):
    generator = torch.Generator().manual_seed(number)
    return {
        "step": number,
        "model": {"a": torch.rand(3, 2, generator=generator), "b": torch.ones(2).bfloat16()},
        "optimizer": {"state": {0: {"step": torch.tensor(float(number))}}, "betas": (0.9, 0.99)},
        "nothing": [None, True, float("inf"), "wörds"],
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture
def checkpoints(tmp_path):
    kept = Checkpoints(tmp_path / "checkpoints", KEY)
    for number in (1, 2, 3):
        kept.save(Checkpoint(0, number, state(number), {"ledger": "x"}))
    return kept, tmp_path / "checkpoints"


def test_a_checkpoint_comes_back_as_it_was(checkpoints):
    kept, folder = checkpoints
    newest, passed_over = kept.newest()
    assert (newest.attempt, newest.step, newest.facts) == (0, 3, {"ledger": "x"})
    assert same(newest.state, state(3))
    assert passed_over == []
    assert len(list(folder.iterdir())) == 4, "two generations of two files"


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(suffix, count, checkpoints):
    kept, folder = checkpoints
    file = folder / f"attempt-0-step-3.{suffix}"
    for bits in damaged(file.read_bytes(), count):
        file.write_bytes(bits)
        newest, passed_over = kept.newest()
        assert newest.step == 2
        assert same(newest.state, state(2))
        assert len(passed_over) == 1
    for path in folder.iterdir():
        path.write_bytes(b"")
    assert kept.newest()[0] is None


def test_a_checkpoint_of_another_run_is_not_loaded(checkpoints):
    assert Checkpoints(checkpoints[1], bytes(32)).newest()[0] is None


def test_what_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(ValueError, match="object"):
        Checkpoints(tmp_path / "c", KEY).save(Checkpoint(0, 1, {"x": object()}, {}))


@pytest.mark.parametrize("count", COUNTS)
def test_a_damaged_ledger_is_not_read(count, undisturbed, tmp_path):
    path = tmp_path / "ledger.jsonl"
    whole = (undisturbed / "r" / "ledger.jsonl").read_bytes()
    key = bytes.fromhex((undisturbed / "r" / "private" / "ledger_key").read_text())
    for bits in damaged(whole, count):
        path.write_bytes(bits)
        try:
            found = ledger.read(path, key)
        except ValueError:
            continue
        assert whole.startswith(bits) or not bits.endswith(b"\n"), "only a cut is not noticed"
        assert found.steps >= bits.count(b'"intent"') - bits.count(b'"kind":"end"')
        assert not found.ended


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["model.safetensors", "report.json", "config.yaml"])
def test_a_damaged_result_is_not_loaded(name, count, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "r", tmp_path / "r")
    file = tmp_path / "r" / name
    whole, report = file.read_bytes(), read_report(tmp_path / "r")
    passed = 0
    for bits in damaged(whole, count):
        file.write_bytes(bits)
        try:
            found = read_report(tmp_path / "r")
        except ValueError:
            continue
        passed += 1  # a flip that spells the same figures: "e" as "E", a blank as another one
        found.pop("seconds"), report.pop("seconds", None)
        assert found == report
    assert passed < count / 10
    file.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="Expected"):
        dpsgd.load_run(tmp_path / "r")


@pytest.mark.parametrize("count", COUNTS)
def test_a_damaged_key_or_note_of_the_attempt_is_noticed(count, tmp_path):
    run = RunDirectory(tmp_path / "r")
    with run.held():
        run.begin(KEY, {"attempt": 3}, "a: 1\n")
        for name, read, good in (("key", run.key, KEY), ("attempt.json", run.record, None)):
            file = run.private / name
            whole = file.read_bytes()
            good = good or run.record()
            for bits in damaged(whole, count):
                file.write_bytes(bits)
                found = read()
                assert not found or found != good or bits.upper() == whole.upper() or (
                    name == "attempt.json" and bits == whole[:-1]
                )  # fmt: skip
                if name == "attempt.json":
                    assert found in ({}, good)
            file.write_bytes(whole)


FILES = [
    "private/key", "private/attempt.json", "private/ledger_key", "config.yaml", "ledger.jsonl",
    "metrics.jsonl", "checkpoints/attempt-0-step-4.json",
    "checkpoints/attempt-0-step-4.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.faults) for i in (1, 2))])
def test_a_run_with_a_damaged_file_is_refused_or_goes_on_soundly(file, seed, undisturbed, tmp_path):
    killed_late(tmp_path)
    path = tmp_path / "r" / file
    path.write_bytes(next(iter(damaged(path.read_bytes(), 1 + seed, seed + 7))) if seed else b"\0")
    done = runs.start(tmp_path).wait()
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr
    if done.returncode == 0:
        runs.check_nothing_is_uncharged(tmp_path)
        assert runs.model(tmp_path) == runs.model(undisturbed) or "new attempt" in done.stdout
    else:
        assert Path(file).name in done.stderr or "ledger" in done.stderr, done.stderr


def killed_late(folder):
    kill = """if True:
        import os
        from dpsgd.private_step import PrivateStep
        _release = PrivateStep.release
        def release(self):
            _release(self)
            if self.step == 6:
                os.kill(os.getpid(), 9)
        PrivateStep.release = release"""
    assert runs.start(folder, before=kill).wait().returncode == -9
