"""Sweeps: jobs one after the other or in parallel, whatever becomes of some of them."""

import json
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from command_line import ROOT, Running, command

from dpsgd import signals
from dpsgd.run_directory import charged

SHORT = ("model=linear", "device=cpu", "accountant=rdp", "trainer.num_steps=4", "run.dir=s")
KEY = "privacy.key='" + "ab" * 32 + "'"
PARALLEL = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def jobs(folder):
    return json.loads((folder / "s" / "sweep.json").read_text())["jobs"]


@pytest.fixture(scope="module", params=["basic", "joblib"])
def mixed(request, tmp_path_factory):
    """A sweep of which the second job is wrong."""
    folder = tmp_path_factory.mktemp(request.param)
    words = PARALLEL if request.param == "joblib" else ()
    settings = ("optimizer.lr=0.1,-1,0.4", "seed=0", KEY)
    return folder, command("-m", *words, *SHORT, *settings, cwd=folder, check=False)


def test_a_job_that_fails_is_one_message_and_leaves_the_others_alone(mixed):
    folder, done = mixed
    assert done.returncode == 2
    assert done.stderr.startswith("Error in job 1 (optimizer.lr=-1): ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout
    assert [job["status"] for job in jobs(folder)] == ["ended", "failed", "ended"]
    assert [(job["run"][0], job["settings"]) for job in jobs(folder)] == [
        ("0", "optimizer.lr=0.1"), ("1", "optimizer.lr=-1"), ("2", "optimizer.lr=0.4"),
    ]  # fmt: skip


def test_the_table_shows_what_varied_what_came_of_it_and_where_it_is(mixed):
    folder, done = mixed
    table = done.stdout[done.stdout.index("dpsgd: sweep") :]
    rows = [line for line in table.splitlines() if line.startswith("│")]
    assert len(rows) == 3
    assert all("optimizer.lr=" in row and "seed" not in row for row in rows)
    assert sum("best" in row for row in rows) == 1
    entry = json.loads((folder / "s" / "sweep.json").read_text())
    assert f"2 runs together: epsilon {entry['epsilon']:.3f}" in " ".join(table.split())
    assert "s/sweep.json" in done.stdout


def test_the_sweep_stands_in_the_report_of_each_job(mixed):
    folder, _ = mixed
    reports = [json.loads(file.read_text()) for file in (folder / "s").glob("*/report.json")]
    assert len(reports) == 2
    assert all(report["sweep"]["epsilon"] > report["epsilon"] for report in reports)


def test_the_key_is_nowhere_and_that_is_said(mixed):
    folder, done = mixed
    assert "NOT PRIVATE" in done.stdout
    assert "abababab" not in done.stdout + done.stderr
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if b"abababab" in path.read_bytes()]
    assert not (folder / "s" / ".jobs").exists()


def test_jobs_in_parallel_tell_how_they_ended_in_one_line(mixed):
    folder, done = mixed
    lines = [line for line in done.stdout.splitlines() if line.startswith("job ")]
    if folder.name.startswith("joblib"):
        assert "training finished" not in done.stdout
        assert sorted(line[:5] for line in lines) == ["job 0", "job 1", "job 2"]
    else:
        assert [line[:5] for line in lines] == ["job 1"], "the others show their reports"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The sweep of the documentation, stopped when a job has taken some steps, and resumed."""
    folder = tmp_path_factory.mktemp("stopped")
    page = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    words = shlex.split(next(line for line in page if "hydra/launcher=joblib" in line))[3:]
    words += [*SHORT[:3], "trainer.num_steps=100", "trainer.evaluate_every=50", "run.dir=s"]
    sweep = Running(*words, cwd=folder)
    deadline = time.monotonic() + 120
    while not _steps(folder, 3):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    sweep.send(signal.SIGINT)
    first = sweep.wait()
    before = {run.name: charged(run).steps for run in _runs(folder)}
    statuses = [job["status"] for job in jobs(folder)]
    return folder, first, before, statuses, command(*words, cwd=folder)


def _runs(folder):
    return sorted(file.parent for file in Path(folder).glob("s/*/ledger.jsonl"))


def _steps(folder, least):
    return any((run / "ledger.jsonl").read_text().count("\n") > least for run in _runs(folder))


def test_all_jobs_stop_when_asked_to(stopped):
    _, first, before, statuses, _ = stopped
    assert first.returncode == 130
    assert "run.dir=s" in first.stdout.splitlines()[-1]
    assert "Traceback" not in first.stderr
    assert statuses
    assert set(statuses) <= {"interrupted", "not begun"}
    assert all(steps < 100 for steps in before.values())


def test_the_same_command_goes_on_with_all_of_them(stopped):
    folder, _, _, _, second = stopped
    assert second.returncode == 0
    assert [job["status"] for job in jobs(folder)] == ["ended"] * 3
    assert [charged(run).steps for run in _runs(folder)] == [100] * 3, "nothing is charged twice"
    assert {charged(run).last_attempt for run in _runs(folder)} == {0}


def test_a_sweep_in_one_process_stops_as_well(tmp_path):
    stop = """if True:
        import os
        from dpsgd.private_step import PrivateStep
        _release = PrivateStep.release
        def release(self):
            _release(self)
            if self.step == 2:
                os.kill(os.getpid(), 15)
        PrivateStep.release = release"""
    words = ("-m", *SHORT, "optimizer.lr=0.1,0.2")
    done = command(*words, cwd=tmp_path, before=stop, check=False)
    assert done.returncode == 130
    assert [job["status"] for job in jobs(tmp_path)] == ["interrupted", "not begun"]
    done = command(*words, cwd=tmp_path)
    assert [job["status"] for job in jobs(tmp_path)] == ["ended", "ended"]


def test_random_stopping_in_a_sweep_is_refused(tmp_path):
    """Its ledger holds the winner alone, so that composition would count too little."""
    words = ("sweep=random_stopping", "sweep.over={optimizer.lr:[0.1,0.2]}", "seed=1,2")
    done = command("-m", *SHORT, *words, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "without -m" in done.stderr
    assert not _runs(tmp_path)


def test_what_is_wrong_with_several_jobs_is_said_once(tmp_path):
    done = command("-m", *SHORT, "seed=-1", "optimizer.lr=1,2", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error in job 0 (optimizer.lr=1), job 1 (optimizer.lr=2): ")
    assert done.stderr.count("seed") == 1


def test_debug_shows_the_traceback_of_a_job(tmp_path):
    words = ("-m", *SHORT, "debug=true", "seed=-1,0", KEY)
    done = command(*words, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "abababab" not in done.stderr
    assert len(_runs(tmp_path)) == 1


@pytest.mark.parametrize(
    ("launcher", "package"),
    [("joblib", "pip install 'dpsgd[sweep]'"), ("submitit_slurm", "hydra-submitit-launcher")],
)
def test_a_launcher_that_is_not_installed_is_named(launcher, package, tmp_path):
    hidden = f"import sys; sys.modules['hydra_plugins.hydra_{launcher}_launcher'] = None"
    words = ("-m", f"hydra/launcher={launcher}", *SHORT, "optimizer.lr=0.1,0.2")
    done = command(*words, cwd=tmp_path, before=hidden, check=False)
    assert done.returncode == 2
    assert done.stderr == f"Error: hydra/launcher={launcher} is not installed: pip install " + (
        f"{package.removeprefix('pip install ')}\n"
    )


@pytest.fixture
def handlers(monkeypatch):
    """Leaves the signals of this process as they were."""
    monkeypatch.setattr(signals, "_of_jobs", None)
    before = {number: signal.getsignal(number) for number in signals._SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_launcher_that_waits_for_a_signal_gets_it_after_the_checkpoint(handlers):
    got = []
    signal.signal(signal.SIGUSR2, lambda number, _: (got.append(number), sys.exit(-1)))
    stop = signals.of_jobs(patient=True)
    with signals.stopping() as asked:
        signal.raise_signal(signal.SIGUSR2)
        assert asked is stop
        assert stop.asked
        assert not got
    with pytest.raises(SystemExit):
        stop.hand_over()
    assert got == [signal.SIGUSR2]


def test_a_launcher_that_does_not_submit_again_lets_the_job_end(handlers):
    def refuse(number, frame):
        raise RuntimeError("timed-out too many times")

    signal.signal(signal.SIGUSR2, refuse)
    stop = signals.of_jobs(patient=True)
    signal.raise_signal(signal.SIGUSR2)
    stop.hand_over()


def test_before_its_steps_a_job_ends_at_once_and_only_once(handlers):
    stop = signals.of_jobs(patient=True)
    with pytest.raises(KeyboardInterrupt), stop.ending(abruptly=True):
        signal.raise_signal(signal.SIGTERM)
    with stop.ending(abruptly=True):
        signal.raise_signal(signal.SIGTERM)
