"""The ledger: what it charges, and what it notices (T4)."""

import json
import os
import signal
import time

import pytest
import torch
import worlds
from command_line import Running

from dpsgd import accounting, engines, ledger
from dpsgd.ledger import Ledger
from dpsgd.run_directory import charged

KEY = bytes(range(32))
PLAN = {
    "sampling": {"sampler": "poisson", "sample_rate": 0.5},
    "unit": "record",
    "num_steps": 9,
    "noise_multiplier": 2.0,
    "delta": 1e-5,
    "adjacency": "add_remove",
    "accountant": "pld",
}


def written(path, steps=3, end=True):
    book = Ledger(path, KEY, PLAN)
    for step in range(steps):
        book.intend(step, 2.0)
    if end:
        book.end(steps)
    book.close()
    return path


def test_it_charges_what_was_intended(tmp_path):
    found = ledger.read(written(tmp_path / "l"), KEY)
    assert (found.steps, found.noise, found.ended, found.verified) == (3, ((2.0, 3),), True, True)
    expected = accounting.epsilon(sample_rate=0.5, noise_multiplier=2.0, num_steps=3, delta=1e-5)
    assert found.epsilon() == expected


def test_no_step_spends_nothing(tmp_path):
    assert ledger.read(written(tmp_path / "l", 0)).epsilon() == 0


def test_a_second_ledger_in_a_place_is_refused(tmp_path):
    path = written(tmp_path / "l")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Expected no ledger"):
        Ledger(path, KEY, PLAN)
    assert path.read_bytes() == before


def test_a_repeated_step_of_an_attempt_is_charged_once_and_another_attempt_again(tmp_path):
    book = Ledger(tmp_path / "l", KEY, PLAN)
    for step, attempt in ((0, 0), (1, 0), (1, 0), (1, 1)):
        book.intend(step, 2.0, attempt)
    book.close()
    assert ledger.read(tmp_path / "l", KEY).steps == 3


def test_nothing_follows_a_charge_that_could_not_be_written(tmp_path, monkeypatch):
    book = Ledger(tmp_path / "l", KEY, PLAN)
    book.intend(0, 2.0)

    def full(file, data):
        os.write(file, data[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledger.durable, "append", full)
        with pytest.raises(OSError, match="No space"):
            book.intend(1, 2.0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        book.intend(1, 2.0)
    again = Ledger.resumed(tmp_path / "l", KEY, 0)
    again.intend(1, 2.0)
    assert ledger.read(tmp_path / "l", KEY).steps == 2


def edits(lines):
    yield "noise", [*lines[:2], lines[2].replace(b'"noise":2.0', b'"noise":3.0'), *lines[3:]]
    yield "removed", [*lines[:2], *lines[3:]]
    yield "swapped", [lines[0], lines[2], lines[1], *lines[3:]]
    yield "repeated", [*lines[:2], lines[1], *lines[2:]]
    yield "plan", [lines[0].replace(b'"sample_rate":0.5', b'"sample_rate":0.4'), *lines[1:]]
    yield "space", [lines[0], lines[1].replace(b'"step":', b'"step": '), *lines[2:]]


@pytest.mark.parametrize("edit", ["noise", "removed", "swapped", "repeated", "plan", "space"])
def test_an_edited_ledger_is_noticed(edit, tmp_path):
    path = written(tmp_path / "l")
    changed = dict(edits(path.read_bytes().splitlines(keepends=True)))[edit]
    path.write_bytes(b"".join(changed))
    with pytest.raises(ValueError, match=r"HMAC|damaged"):
        ledger.read(path, KEY)


def test_another_runs_key_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="HMAC"):
        ledger.read(written(tmp_path / "l"), bytes(32))


def test_no_truncation_is_read_as_fewer_steps_than_were_begun_unless_lines_are_whole(tmp_path):
    path = written(tmp_path / "l", end=False)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(ends[0], len(whole)):
        path.write_bytes(whole[:length])
        found = ledger.read(path, KEY)
        begun = sum(end < length for end in ends)
        assert found.steps == begun
        assert found.torn == (length not in ends)
        assert not found.ended


def test_flipped_bits_never_pass(tmp_path):
    path = written(tmp_path / "l")
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"ledger|plan"):
            ledger.read(path, KEY)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"[]\n", b"{}\n", b'{"mac":1}\n', b"\xff\xfe\n", b'{"kind":"intent","mac":""}\n'],
)
def test_what_is_no_ledger_is_refused(content, tmp_path):
    (tmp_path / "l").write_bytes(content)
    with pytest.raises(ValueError, match=r"ledger|plan"):
        ledger.read(tmp_path / "l")


def trainer(steps=6):
    return worlds.trainer(worlds.vectors, engines.Hooks, torch.float32, steps=steps)


def test_the_charge_is_on_disk_before_the_step_draws(tmp_path, monkeypatch):
    made, noise = trainer()
    book = Ledger(tmp_path / "l", KEY, made.plan.describe())
    seen = []
    draw = type(made.plan.sampler).sample

    def watched(self, step, stop, start=0):
        seen.append((step, ledger.read(tmp_path / "l", KEY).steps, len(noise.released)))
        return draw(self, step, stop, start)

    monkeypatch.setattr(type(made.plan.sampler), "sample", watched)
    list(made.run(book))
    assert seen == [(step, step + 1, step) for step in range(6)]


@pytest.mark.parametrize("kind", ["break", "exception", "interrupt"])
def test_every_release_is_charged_however_the_run_ends(kind, tmp_path):
    made, noise = trainer()
    book = Ledger(tmp_path / "l", KEY, made.plan.describe())
    failing = iter(range(10))

    class Failure(KeyboardInterrupt if kind == "interrupt" else RuntimeError):
        pass

    original = made.data.take

    def take(indices):
        if next(failing) >= 7 and kind != "break":
            raise Failure
        return original(indices)

    object.__setattr__(made.data, "take", take)
    try:
        for report in made.run(book):
            if report.step == 3 and kind == "break":
                break
    except Failure:
        pass
    spent = ledger.read(tmp_path / "l", KEY)
    assert len(noise.released) >= 2
    assert len(noise.released) <= spent.steps <= len(noise.released) + 1


def test_the_budget_ends_the_charges(tmp_path):
    made, noise = trainer(4)
    book = Ledger(tmp_path / "l", KEY, made.plan.describe())
    list(made.run(book))
    list(made.run(book))
    assert ledger.read(tmp_path / "l", KEY).steps == len(noise.released) == 4


COUNTING = """
import os, sys
from dpsgd.noise import Gaussian
original = Gaussian.add_
def counted(self, sums, std, step, offsets=None):
    original(self, sums, std, step, offsets)
    with open("released", "ab", buffering=0) as file:
        file.write(b"x")
Gaussian.add_ = counted
"""


@pytest.mark.parametrize("after", [5, 40])
def test_kill_9_leaves_no_uncharged_release(after, tmp_path):
    words = ("trainer.num_steps=100000", "privacy.noise_multiplier=500", "run.dir=r",
             "model=linear", "trainer.evaluate_every=100000", "device=cpu")  # fmt: skip
    running = Running(*words, cwd=tmp_path, before=COUNTING)
    released = tmp_path / "released"
    deadline = time.monotonic() + 120
    while not released.exists() or released.stat().st_size < after:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    running.send(signal.SIGKILL)
    assert running.wait().returncode == -signal.SIGKILL
    found = charged(tmp_path / "r")
    assert found.verified
    assert not found.ended
    assert after <= released.stat().st_size <= found.steps <= released.stat().st_size + 1


def test_the_ledger_shows_no_key(tmp_path):
    text = written(tmp_path / "l").read_text()
    assert KEY.hex() not in text
    assert all(json.loads(line) for line in text.splitlines())
