"""A run goes on exactly where it was; what cannot be exact is new, charged again, and said."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import runs
import torch
from command_line import ROOT, Running, command, environment

from dpsgd import accounting, replay
from dpsgd.run_directory import charged

FRESH = [word for word in runs.SHORT if word != runs.KEY]


STOP = """
import os
from dpsgd.private_step import PrivateStep
_release = PrivateStep.release
def release(self):
    _release(self)
    if self.step == {after}:
        os.kill(os.getpid(), {sent})
PrivateStep.release = release
"""


def stopped(folder, *extra, words=runs.SHORT, after=3, sent=signal.SIGTERM):
    """A run that was asked to stop after some steps."""
    stop = STOP.format(after=after, sent=int(sent))
    done = Running(*words, *extra, cwd=folder, before=runs.watched(folder) + stop).wait()
    assert done.returncode in (130, -9), done.stderr + done.stdout
    return done


class Halts:
    """Runs that were stopped, each made once; whoever asks gets it as it was, where it was made.

    What is put back at its own place is not a copy to dpsgd, which tells copies by their path.
    """

    def __init__(self, folder):
        self._folder, self._made = folder, []

    def __call__(self, *extra, **how):
        if (extra, how) in self._made:
            place = self._folder / str(self._made.index((extra, how)))
            shutil.rmtree(place)
            shutil.copytree(f"{place}-kept", place)
            return place
        place = self._folder / str(len(self._made))
        place.mkdir()
        stopped(place, *extra, **how)
        shutil.copytree(place, f"{place}-kept")
        self._made.append((extra, how))
        return place


@pytest.fixture(scope="module")
def halts(tmp_path_factory):
    return Halts(tmp_path_factory.mktemp("halts"))


@pytest.fixture
def halted(halts):
    """A folder with the run `r`, which was asked to stop after three steps."""
    return halts()


@pytest.fixture
def halted_fresh(halts):
    """The same of a run without a fixed key."""
    return halts(words=FRESH)


@pytest.fixture
def killed(halts):
    """A folder with the run `r`, which was killed after three steps."""
    return halts(sent=signal.SIGKILL)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def resumed(folder, *extra, before="", check=True, **options):
    words = ["resume=r", *extra]
    return command(*words, cwd=folder, before=runs.watched(folder) + before, check=check, **options)


def test_a_run_that_was_asked_to_stop_ends_like_any_other(undisturbed, halted):
    assert [step for step, _ in runs.releases(halted)] == [0, 1, 2]
    resumed(halted)
    assert [step for step, _ in runs.releases(halted)] == list(range(7)), "nothing is repeated"
    assert runs.model(halted) == runs.model(undisturbed)
    assert runs.history(halted) == runs.history(undisturbed)
    assert charged(halted / "r").ended
    assert not (halted / "r" / "private" / "key").exists()


@pytest.mark.parametrize("rows", [5, slow(1000)])
def test_at_every_physical_batch_size(rows, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    extra = f"trainer.physical_batch_size={rows}"
    for folder in (whole, cut):
        folder.mkdir()
    runs.finish(whole, extra)
    stopped(cut, extra, sent=signal.SIGKILL)
    runs.finish(cut, extra)
    assert runs.model(cut) == runs.model(whole)


@pytest.mark.parametrize(
    "extra",
    [
        slow(("engine=vmap",)),
        ("engine=opacus", "clipping=flat"),
        slow(("optimizer=adam",)),
        ("dtype=bfloat16", "engine=hooks"),
        ("sampler=shuffled", "privacy.adjacency=replace_one", "accountant=pld"),
        ("model=cnn", "clipping=per_layer", "privacy.noise_schedule={0:1,3:2}"),
    ],
    ids=str,
)
def test_with_every_kind_of_state(extra, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = list(runs.SHORT)
    if "model=cnn" in extra or "clipping=flat" in extra or "clipping=per_layer" in extra:
        words.remove("clipping=adaptive")
    if "sampler=shuffled" in extra:
        words.remove("accountant=rdp")
        words[words.index("sampler.sample_rate=0.1")] = "sampler.expected_batch_size=300"
    for folder in (whole, cut):
        folder.mkdir()
    command(*words, *extra, cwd=whole, before=runs.watched(whole))
    stopped(cut, *extra, words=words, sent=signal.SIGKILL)
    resumed(cut)
    assert runs.model(cut) == runs.model(whole)
    assert charged(cut / "r").epsilon() == charged(whole / "r").epsilon()


def test_steps_after_a_kill_are_the_same_without_a_fixed_key(halts):
    """Noise and coins follow from what is in private/, not from privacy.key."""
    folder = halts(words=FRESH, sent=signal.SIGKILL)
    resumed(folder)
    steps = [step for step, _ in runs.releases(folder)]
    assert steps == [0, 1, 2, 2, 3, 4, 5, 6], "from the checkpoint at step 2"
    runs.check_nothing_is_uncharged(folder)


CHANGES = [
    (["optimizer.lr=0.05"], {}, "optimizer.lr was 0.2 and is 0.05"),
    (["trainer.physical_batch_size=16"], {}, "physical_batch_size was 32 and is 16"),
    (["engine=loop"], {}, "engine._target_"),
    (["seed=1"], {}, "seed was 0 and is 1"),
    ([], {"before": "import torch; torch.set_num_threads(2)"}, "threads was 1 and is 2"),
    ([], {"before": "import dpsgd.replay as r; r._code = lambda: 'other'"}, "code was"),
]


@pytest.mark.parametrize(("extra", "options", "words"), CHANGES, ids=[row[2] for row in CHANGES])
def test_what_cannot_be_exact_is_a_new_attempt(extra, options, words, killed):
    before = options.pop("before", "")
    done = command("resume=r", *extra, cwd=killed, before=runs.watched(killed) + before)
    options["before"] = before
    assert words in " ".join(done.stdout.replace("│", " ").split())
    found = charged(killed / "r")
    assert found.last_attempt == 1
    assert [(a.start, sum(n for _, n in a.noise)) for a in found.attempts] == [
        (0, 3),
        (2, 4),
    ], "one step was charged twice, so the budget ends one step before the last"
    report = json.loads((killed / "r" / "report.json").read_text())
    assert report["charged_steps"] == 7
    assert report["steps"] == 6
    digests = [digest for _, digest in runs.releases(killed)]
    assert len(set(digests)) == len(digests) == 7, "no noise is used again"


def test_the_device_that_a_run_was_told_does_not_matter_but_the_one_it_has(halted):
    resumed(halted, "device=auto")
    assert charged(halted / "r").last_attempt == 0


@pytest.mark.parametrize(
    ("change", "was"),
    [
        ("privacy.noise_multiplier=4", "5.0"),
        ("clipping.max_grad_norm=2", "1.0"),
        ("sampler.sample_rate=0.2", "0.1"),
        ("trainer.num_steps=9", "7"),
        ("privacy.target_delta=1e-6", "1e-05"),
        ("data.public_size=1400", "1437"),
    ],
)
def test_the_guarantee_cannot_change_under_way(change, was, halted):
    before = contents(halted / "r")
    for words in ([*runs.SHORT, change], ["resume=r", change]):
        kept = [word for word in words if word.split("=")[0] != change.split("=")[0]]
        done = command(*kept, change, cwd=halted, check=False)
        assert done.returncode == 2
        name, _, now = change.partition("=")
        row = next(line for line in done.stderr.splitlines() if name in line)
        assert row.split()[1] == was
        assert float(row.split()[2]) == float(now)
        assert "the run's" in done.stderr
    assert contents(halted / "r") == before, "it goes on as if nothing had been asked"


def test_other_records_are_refused_unless_they_are_wanted(tmp_path):
    def write(seed):
        generator = np.random.default_rng(seed)
        x, y = generator.random((40, 4), dtype=np.float32), generator.integers(0, 3, 40)
        np.savez(tmp_path / "data.npz", x=x, y=y)

    words = [w for w in FRESH if not w.startswith(("sampler", "model.", "model="))] + [
        "data=tensors", "data.path=data.npz", "data.input_shape=[4]", "data.num_classes=3",
        "data.public_size=40", "model=linear", "sampler.sample_rate=0.5",
    ]  # fmt: skip
    write(0)
    stopped(tmp_path, words=words)
    write(1)
    done = resumed(tmp_path, check=False)
    assert done.returncode == 2
    assert "Expected the training records that the run began with" in done.stderr
    stop = STOP.format(after=4, sent=15)
    resumed(tmp_path, "checkpoint.allow_new_data=true", before=stop, check=False)
    assert charged(tmp_path / "r").last_attempt == 1
    write(2)
    done = resumed(tmp_path, check=False)
    assert done.returncode == 2, "the permission was for one command"


def test_a_copy_forks_and_a_moved_directory_does_not(tmp_path):
    stopped(tmp_path)
    shutil.copytree(tmp_path / "r", tmp_path / "copy")
    done = command("resume=copy", cwd=tmp_path, before=runs.watched(tmp_path))
    assert "copy of" in done.stdout
    (tmp_path / "r").rename(tmp_path / "elsewhere")
    command("resume=elsewhere", cwd=tmp_path, before=runs.watched(tmp_path))
    assert charged(tmp_path / "copy").last_attempt == 1
    assert charged(tmp_path / "copy").steps == 7, "what was charged before is inherited"
    assert charged(tmp_path / "elsewhere").last_attempt == 0
    digests = [digest for _, digest in runs.releases(tmp_path)]
    assert len(set(digests)) == len(digests) == 3 + 4 + 4


def test_an_older_state_put_back_repeats_the_same_releases(halted):
    shutil.copytree(halted / "r", halted / "backup")
    resumed(halted)
    shutil.rmtree(halted / "r")
    shutil.move(halted / "backup", halted / "r")
    resumed(halted)
    made = [digest for _, digest in runs.releases(halted)]
    assert made[3:7] == made[7:], "the same noise on the same sums"


@pytest.mark.parametrize("damage", ["edited", "cut", "gone", "no key"])
def test_a_ledger_that_does_not_fit_is_refused(damage, halted):
    ledger = halted / "r" / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    if damage == "edited":
        ledger.write_bytes(ledger.read_bytes().replace(b'"noise":5.0', b'"noise":6.0', 1))
    elif damage == "cut":
        ledger.write_bytes(b"".join(lines[:-1]))
    elif damage == "gone":
        ledger.unlink()
    else:
        (halted / "r" / "private" / "ledger_key").unlink()
    before = ledger.read_bytes() if ledger.exists() else None
    done = resumed(halted, check=False)
    assert done.returncode == 2
    assert "ledger" in done.stderr
    assert "Traceback" not in done.stderr
    assert (ledger.read_bytes() if ledger.exists() else None) == before
    assert len(runs.releases(halted)) == 3


def test_two_processes_do_not_share_a_run(halted):
    slow = (
        "import time; from dpsgd.trainer import Trainer; Trainer._take = lambda *_: time.sleep(99)"
    )
    first = Running("resume=r", cwd=halted, before=slow)
    try:
        size = (halted / "r" / "ledger.jsonl").stat().st_size
        while (halted / "r" / "ledger.jsonl").stat().st_size == size:
            pass
        done = resumed(halted, check=False)
        assert done.returncode == 2
        assert "one process per run" in done.stderr
    finally:
        first.send(signal.SIGKILL)
        first.wait()
    resumed(halted)


def test_a_run_that_ended_is_not_begun_again(undisturbed):
    for words in (runs.SHORT, ["resume=r"]):
        done = command(*words, cwd=undisturbed, check=False)
        assert done.returncode == 2
        assert "has ended" in done.stderr


def test_no_key_is_in_any_file_but_its_own(halted_fresh):
    key = (halted_fresh / "r" / "private" / "key").read_text()
    ledger_key = (halted_fresh / "r" / "private" / "ledger_key").read_text()
    for path in (halted_fresh / "r").rglob("*"):
        if path.is_file() and path.name not in ("key", "ledger_key"):
            content = path.read_bytes()
            for secret in (key, ledger_key):
                assert secret.encode() not in content
                assert bytes.fromhex(secret) not in content
        assert path.stat().st_mode & 0o077 == 0 or "private" not in path.parts


def test_an_interrupted_choice_among_runs_leaves_no_key(tmp_path):
    stop = "import os, signal; from dpsgd.trainer import Trainer; " \
        "Trainer._take = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or ([], 0)"  # fmt: skip
    words = ["sweep=random_stopping", "sweep.over={optimizer.lr:[0.1,0.2]}", "sweep.mean=3"]
    done = command(*FRESH, *words, cwd=tmp_path, before=stop, check=False)
    assert done.returncode == 130, done.stderr
    assert not list((tmp_path / "r").rglob("key"))
    done = command(*FRESH, *words, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "cannot go on" in done.stderr


def test_the_real_command_resumes_too(halted_fresh):
    """Once without the tests' process of which commands are forks."""
    subprocess.run(
        [sys.executable, "-m", "dpsgd.train", "resume=r"],
        cwd=halted_fresh, env=environment(), check=True, capture_output=True,
    )  # fmt: skip
    assert os.path.exists(ROOT)
    assert charged(halted_fresh / "r").ended


def test_a_key_that_is_no_longer_fixed_is_a_new_attempt(halted):
    """The streams of a fixed key leave the records out: the same attempt would have two of them."""
    done = command(*FRESH, cwd=halted, before=runs.watched(halted))
    assert "privacy.key was fixed" in " ".join(done.stdout.split())
    assert "NOT PRIVATE" in done.stdout, "some of its releases are not"
    assert charged(halted / "r").last_attempt == 1


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("quantile: 0.5", "quantile: 0.9"),
        ("noise_schedule: null", "noise_schedule: {0: 1.0, 4: 0.3}"),
        ("num_steps: 7", "num_steps: 70"),
    ],
)
def test_an_edited_configuration_does_not_change_the_guarantee(was, now, halted):
    config = halted / "r" / "config.yaml"
    config.write_text(config.read_text().replace(was, now))
    done = resumed(halted, check=False)
    assert done.returncode == 2
    assert "the run's" in done.stderr


def test_every_attempt_keeps_to_the_budget_also_when_it_is_resumed(killed):
    stopped(killed, "optimizer.lr=0.05", after=4)
    runs.finish(killed, "optimizer.lr=0.05")
    found = charged(killed / "r")
    report = json.loads((killed / "r" / "report.json").read_text())
    assert (found.last_attempt, found.steps, report["steps"]) == (1, 7, 6)
    assert report["epsilon"] == pytest.approx(0.2198, abs=1e-3), "that of the plan"
    lines = [json.loads(x) for x in (killed / "r" / "metrics.jsonl").read_text().splitlines()]
    spent = [line["privacy/epsilon"] for line in lines if "privacy/epsilon" in line]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(report["epsilon"])
    rates = [line["optimizer/learning_rate"] for line in lines if "privacy/epsilon" in line]
    assert max(spent) <= report["epsilon"] * (1 + 1e-9), "in between neither"
    assert report["attempts"] == [
        {"first_step": 0, "charged_steps": 3},
        {"first_step": 2, "charged_steps": 4},
    ]
    page = " ".join(re.sub("<[^>]*>", " ", (killed / "r" / "report.html").read_text()).split())
    assert "3 steps from step 0 on, then 4 steps from step 2 on" in page
    assert "ended early, where the budget did" in page
    assert rates == [0.2, 0.2, 0.05, 0.05, 0.05, 0.05], "what is typed has an effect"


def test_a_schedule_of_the_batch_goes_on_where_it_was(tmp_path):
    """Interrupted before the change, it is what an undisturbed run is, and charged as such."""
    growing = "sampler.schedule={0:0.5,4:2.0}"
    (tmp_path / "whole").mkdir()
    runs.finish(tmp_path / "whole", growing)
    stopped(tmp_path, growing)
    resumed(tmp_path)
    assert runs.model(tmp_path) == runs.model(tmp_path / "whole")
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["sampling"]["schedule"] == {"0": 0.5, "4": 2.0}
    figures = {"noise_multiplier": 5.0, "delta": 1e-5, "accountant": "rdp"}
    early = accounting.epsilon(sample_rate=0.05, num_steps=4, **figures)
    late = accounting.epsilon(sample_rate=0.2, num_steps=3, **figures)
    assert max(early, late) < report["epsilon"] < early + late
    assert charged(tmp_path / "r").epsilon() == report["epsilon"]
    assert "agrees" in command("ledger=r", cwd=tmp_path, module="dpsgd.account").stdout
    page = " ".join(re.sub("<[^>]*>", " ", (tmp_path / "r" / "report.html").read_text()).split())
    assert "expected batch size 71.85 from the start, 287.4 after 4 steps" in page


def test_another_optimizer_begins_without_a_state(halted):
    done = resumed(halted, "optimizer=adam")
    assert "optimizer._target_ was torch.optim.SGD" in " ".join(done.stdout.split())
    assert charged(halted / "r").ended


def test_an_old_attempt_put_back_beside_a_newer_ledger_does_not_go_on(killed):
    shutil.copytree(killed / "r", killed / "backup")
    stopped(killed, "optimizer.lr=0.05", after=4)
    for name in ("checkpoints", "private"):
        shutil.rmtree(killed / "r" / name)
        shutil.copytree(killed / "backup" / name, killed / "r" / name)
    done = resumed(killed, check=False)
    assert done.returncode in (0, 2)
    found = charged(killed / "r")
    digests = [digest for _, digest in runs.releases(killed)]
    assert len(set(digests)) <= found.steps


def test_conditions_name_the_variables_that_change_the_rounding(monkeypatch):
    for name in ("MKL_CBWR", "OMP_SCHEDULE", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.setenv(name, "1")
        assert replay.conditions(torch.device("cpu"))[name] == "1"


@pytest.mark.parametrize("name", ["MKL_CBWR", slow("OMP_SCHEDULE"), slow("ONEDNN_MAX_CPU_ISA")])
def test_variables_that_change_the_rounding_end_a_replay(name, halted):
    done = resumed(halted, variables={name: "1"})
    assert name in done.stdout
    assert charged(halted / "r").last_attempt == 1


@pytest.mark.parametrize(
    "optimizer", ["NAdam", slow("ASGD"), slow("Adadelta"), slow("RMSprop"), slow("Adagrad")]
)
def test_states_of_optimizers_come_back_in_their_own_types(optimizer, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    extra = ("dtype=bfloat16", f"optimizer._target_=torch.optim.{optimizer}", "optimizer.lr=0.01")
    for folder in (whole, cut):
        folder.mkdir()
    runs.finish(whole, *extra)
    stopped(cut, *extra, after=4)
    resumed(cut)
    assert charged(cut / "r").last_attempt == 0
    assert runs.model(cut) == runs.model(whole)


def test_resume_with_several_jobs_is_refused(halted):
    done = command("-m", "resume=r", cwd=halted, check=False)
    assert done.returncode == 2
    assert "leave out -m" in done.stderr


def test_a_sweep_goes_on_with_the_same_command(tmp_path):
    words = [w for w in FRESH if w != "run.dir=r"] + ["run.dir=s", "optimizer.lr=0.1,0.2"]
    breaks = """if True:
        import os
        from dpsgd.private_step import PrivateStep
        _release, count = PrivateStep.release, iter(range(99))
        def release(self):
            _release(self)
            if next(count) == 10:
                os.kill(os.getpid(), 9)
        PrivateStep.release = release"""
    done = command("-m", *words, cwd=tmp_path, before=breaks, check=False)
    assert done.returncode == -9
    done = command("-m", *words, cwd=tmp_path)
    assert "had ended; it is not repeated" in " ".join(done.stdout.split())
    jobs = sorted((tmp_path / "s").glob("*/ledger.jsonl"))
    assert [charged(job.parent).steps for job in jobs] == [7, 7]


def test_a_run_that_another_process_ended_meanwhile_is_not_begun_again(tmp_path):
    waits = """if True:
        import pathlib, time
        from dpsgd.trainer import Trainer
        _warm_up = Trainer.warm_up
        def warm_up(self):
            _warm_up(self)
            pathlib.Path("prepared").touch()
            while not pathlib.Path("go").exists():
                time.sleep(0.01)
        Trainer.warm_up = warm_up"""
    late = Running(*FRESH, "optimizer.lr=0.05", cwd=tmp_path, before=waits)
    while not (tmp_path / "prepared").exists():
        pass
    command(*FRESH, cwd=tmp_path)
    before = (tmp_path / "r" / "ledger.jsonl").read_bytes()
    (tmp_path / "go").touch()
    done = late.wait()
    assert done.returncode == 2
    assert "has ended" in done.stderr
    assert (tmp_path / "r" / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["ledger.jsonl", "config.yaml", "metrics.jsonl", "private/key"])
def test_a_directory_in_the_place_of_a_file_is_one_message(name, halted):
    path = halted / "r" / name
    path.unlink()
    path.mkdir()
    done = resumed(halted, check=False)
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr
    if done.returncode == 0:
        runs.check_nothing_is_uncharged(halted)


@pytest.mark.parametrize("text", ["privacy: 5\n", "a: 1\n", "[]\n", "{\n", "privacy: {a: 1}\n"])
def test_a_configuration_of_nonsense_is_one_message(text, halted):
    (halted / "r" / "config.yaml").write_text(text)
    done = resumed(halted, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Error: " in done.stderr


def test_what_is_left_of_an_older_run_does_not_confuse_a_new_one(tmp_path):
    runs.finish(tmp_path)
    for name in ("config.yaml", "ledger.jsonl", "model.safetensors"):
        (tmp_path / "r" / name).unlink()
    (tmp_path / "released").unlink()
    stopped(tmp_path, words=FRESH, sent=signal.SIGKILL)
    resumed(tmp_path)
    runs.check_nothing_is_uncharged(tmp_path)


def test_the_report_of_an_interruption_does_not_outlive_it(halted):
    assert (halted / "r" / "report.json").exists()
    resumed(halted, before=STOP.format(after=5, sent=9), check=False)
    assert not (halted / "r" / "report.json").exists()
    done = command("ledger=r", module="dpsgd.account", cwd=halted)
    assert "resume=r goes on with it" in " ".join(done.stdout.replace("│", " ").split())


@pytest.mark.parametrize("name", ["key", "attempt.json"])
def test_without_its_notes_a_run_goes_on_only_when_told_to(name, halted_fresh):
    (halted_fresh / "r" / "private" / name).write_text("nonsense")
    done = resumed(halted_fresh, check=False)
    assert done.returncode == 2
    assert "whether the records are the same" in done.stderr
    resumed(halted_fresh, "checkpoint.allow_new_data=true")
    assert charged(halted_fresh / "r").last_attempt == 1
