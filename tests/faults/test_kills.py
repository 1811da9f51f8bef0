"""Killed anywhere, a run ends with the same model, bit for bit, and no step is uncharged."""

import random
import signal
import time

import pytest
import runs
import shims


def places(folder):
    """How many places a run has in which it can die, by name."""
    before = shims.POINTS.format(at=-1, path=str(folder / "places"))
    done = runs.start(folder, before=before).wait()
    assert done.returncode == 0, done.stderr
    return (folder / "places").read_text().splitlines()


@pytest.fixture(scope="session")
def all_places(tmp_path_factory):
    return places(tmp_path_factory.mktemp("places"))


def killed(folder, at, *extra):
    done = runs.start(folder, *extra, before=shims.POINTS.format(at=at, path="")).wait()
    assert done.returncode == -signal.SIGKILL, done.stderr + done.stdout


def check_same(folder, undisturbed):
    assert runs.model(folder) == runs.model(undisturbed)
    assert runs.history(folder) == runs.history(undisturbed)
    runs.check_nothing_is_uncharged(folder)


def spread(count, all_places):
    """Numbers of places, from the first to the last."""
    return [1 + i * (len(all_places) - 1) // (count - 1) for i in range(count)]


@pytest.mark.parametrize("part", range(8))
def test_a_kill_at_a_few_places(part, all_places, undisturbed, tmp_path):
    killed(tmp_path, spread(8, all_places)[part])
    runs.finish(tmp_path)
    check_same(tmp_path, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(200))
def test_a_kill_at_every_place(part, all_places, undisturbed, tmp_path):
    assert 100 < len(all_places) <= 200, "more places than there are kills"
    killed(tmp_path, min(part + 1, len(all_places)))
    runs.finish(tmp_path)
    check_same(tmp_path, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(30))
def test_kills_at_random_times_one_after_another(seed, undisturbed, tmp_path):
    lots = random.Random(seed)
    for _ in range(3):
        running = runs.start(tmp_path)
        time.sleep(lots.uniform(0.2, 2.0))
        running.send(signal.SIGKILL)
        running.wait()
    runs.finish(tmp_path)
    check_same(tmp_path, undisturbed)


def test_the_steps_before_a_checkpoint_are_not_repeated(all_places, tmp_path):
    late = max(i for i, name in enumerate(all_places) if name == "after replace") - 20
    killed(tmp_path, late)
    before = len(runs.releases(tmp_path))
    runs.finish(tmp_path)
    again = [step for step, _ in runs.releases(tmp_path)[before:]]
    assert again == list(range(again[0] if again else runs.STEPS, runs.STEPS))
    assert len(again) <= 2, "the last checkpoint is two steps back at most"
