"""A disk that is full, broken or read-only, and memory that does not suffice."""

import re

import pytest
import runs
import shims
from command_line import command

from dpsgd.run_directory import charged


def failed(folder, before, *extra):
    done = runs.start(folder, *extra, before=before).wait()
    assert done.returncode == 2, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Error: ") == 1
    return " ".join(done.stderr.split())


def check_goes_on(folder, undisturbed):
    """Once the disk is well again, the same command ends as if nothing had happened."""
    runs.finish(folder)
    assert runs.model(folder) == runs.model(undisturbed)
    runs.check_nothing_is_uncharged(folder)


@pytest.mark.parametrize("at", [1, 2, 6, 13, 19, 22])
def test_a_full_disk(at, undisturbed, tmp_path):
    text = failed(tmp_path, shims.FAILS.format(name="write", at=at, code="ENOSPC"))
    assert "No space left on device" in text
    assert "go on with: python -m dpsgd.train resume=r" in text
    check_goes_on(tmp_path, undisturbed)


@pytest.mark.parametrize("at", [1, 5, 12, 25])
def test_a_disk_that_does_not_keep_its_promises(at, undisturbed, tmp_path):
    text = failed(tmp_path, shims.FAILS.format(name="fsync", at=at, code="EIO"))
    assert "Input/output error" in text
    check_goes_on(tmp_path, undisturbed)


def test_a_disk_that_becomes_read_only(undisturbed, tmp_path):
    text = failed(tmp_path, shims.FAILS.format(name="replace", at=6, code="EROFS"))
    assert "Read-only file system" in text
    check_goes_on(tmp_path, undisturbed)


def test_a_limit_of_the_kernel_on_what_may_be_written(undisturbed, tmp_path):
    """No shim: the kernel refuses to let any file grow."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    text = failed(tmp_path, limit)
    assert "File too large" in text
    check_goes_on(tmp_path, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
@pytest.mark.parametrize("at", range(1, 41, 3))
def test_a_disk_that_fails_at_any_time(name, at, undisturbed, tmp_path):
    done = runs.start(tmp_path, before=shims.FAILS.format(name=name, at=at, code="ENOSPC")).wait()
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == ("Error: " not in done.stderr), done.stderr
    check_goes_on(tmp_path, undisturbed)


def test_a_physical_batch_that_does_not_fit_is_halved_once(tmp_path):
    done = runs.start(tmp_path, before=shims.MEMORY.format(most=16)).wait()
    assert done.returncode == 0, done.stderr
    assert "It has 16 rows from now on" in " ".join(done.stdout.split())
    other = tmp_path / "other"
    other.mkdir()
    words = [word for word in runs.SHORT if not word.startswith("trainer.physical")]
    command(*words, "trainer.physical_batch_size=16", cwd=other)
    assert runs.model(tmp_path) == runs.model(other), "the same as if 16 had been asked for"


def test_a_physical_batch_of_which_half_does_not_fit_is_an_error(tmp_path):
    text = failed(tmp_path, shims.MEMORY.format(most=15))
    assert re.search(r"neither 32 nor 16 rows fit. Lower trainer.physical_batch_size", text)
    assert not (tmp_path / "r").exists(), "nothing was spent, nothing is left"


def test_memory_that_is_gone_in_the_middle_of_a_run(undisturbed, tmp_path):
    later = shims.MEMORY.format(most=32).replace(
        "if len(batch[0])", "if self.step == 3 and len(batch[0]) + 99"
    )
    text = failed(tmp_path, later)
    assert "Out of memory at step 3" in text
    assert "resume=r" in text
    assert charged(tmp_path / "r").steps == 4
    check_goes_on(tmp_path, undisturbed)


def test_an_error_of_the_model_in_the_middle_of_a_run(undisturbed, tmp_path):
    breaks = """if True:
        from dpsgd.data import Dataset
        take, count = Dataset.take, iter(range(99))
        def broken(self, indices):
            if next(count) == 20:
                raise OSError(5, "Input/output error", "the data")
            return take(self, indices)
        Dataset.take = broken"""
    assert "resume=r" in failed(tmp_path, breaks)
    check_goes_on(tmp_path, undisturbed)
