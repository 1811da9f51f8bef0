"""`torchrun ... -m dpsgd.train`: what one process trains, from start to end."""

import json
import shutil
import signal
import time

import pytest
import torch
from command_line import command
from jobs import Job, job
from safetensors.torch import load_file

KEY = "ab" * 32
SMALL = (
    "model=mlp", "model.widths=[16]", "device=cpu", "sampler.sample_rate=0.05",
    "trainer.num_steps=5", "trainer.physical_batch_size=16", "trainer.evaluate_every=2",
    "privacy.noise_multiplier=1", f"privacy.key={KEY}",
)  # fmt: skip


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def weights(run):
    return load_file(run / "model.safetensors")


def assert_same(run, other, tolerance):
    expected, found = weights(other), weights(run)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=tolerance, atol=tolerance)


def lines(run, name="ledger.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("way", "processes", "dtype", "tolerance"),
    [
        ("ddp", 2, "float32", 1e-6), slow("ddp", 4, "float64", 1e-12),
        slow("ddp", 1, "float64", 1e-12), ("fsdp", 2, "float64", 1e-12),
        slow("fsdp", 4, "float64", 1e-12), slow("fsdp", 4, "float32", 1e-6),
        slow("fsdp", 1, "float64", 1e-12),
    ],
)  # fmt: skip
def test_several_processes_train_what_one_trains(way, processes, dtype, tolerance, tmp_path):
    arguments = *SMALL, f"dtype={dtype}"
    command(*arguments, "run.dir=one", cwd=tmp_path)
    done = job(*arguments, "run.dir=all", f"parallel={way}", processes=processes, cwd=tmp_path)
    assert_same(tmp_path / "all", tmp_path / "one", tolerance)
    assert "training finished" in done[0].stdout
    assert all(one.stdout == one.stderr == "" for one in done[1:])
    report, expected = (
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("all", "one")
    )
    assert report["epsilon"] == expected["epsilon"]
    assert report["test"] == pytest.approx(expected["test"], rel=1e-5)
    intents = [line["step"] for line in lines(tmp_path / "all") if "step" in line]
    assert intents == [line["step"] for line in lines(tmp_path / "one") if "step" in line]


@pytest.mark.parametrize(
    "extra",
    [
        ("engine=vmap", "clipping=adaptive"), slow(("engine=hooks",)),
        slow(("engine=loop", "trainer.num_steps=2")), slow(("engine=opacus",)),
        slow(("clipping=per_layer", "optimizer=adam")),
        slow(("sampler=truncated_poisson", "sampler.max_batch_size=80")),
        slow(("sampler=shuffled", "privacy.adjacency=replace_one")),
    ],
)  # fmt: skip
def test_every_engine_policy_and_sampler_in_two_processes(extra, tmp_path):
    arguments = *SMALL, "dtype=float64", *extra
    command(*arguments, "run.dir=one", cwd=tmp_path)
    job(*arguments, "run.dir=all", "parallel=ddp", processes=2, cwd=tmp_path)
    assert_same(tmp_path / "all", tmp_path / "one", 1e-12)


@pytest.mark.parametrize("way", [slow("ddp"), "fsdp"])
def test_steps_with_fewer_samples_than_processes(way, tmp_path):
    arguments = *SMALL, "dtype=float64", "sampler.sample_rate=0.001", "trainer.num_steps=6"
    command(*arguments, "run.dir=one", "logger.diagnostics=true", cwd=tmp_path)
    drawn = [
        line["NOT_PRIVATE/drawn_batch_size"]
        for line in lines(tmp_path / "one/private", "diagnostics.jsonl")
    ]
    assert min(drawn) == 0
    assert 0 < max(drawn) < 8
    job(*arguments, "run.dir=all", f"parallel={way}", processes=3, cwd=tmp_path)
    assert_same(tmp_path / "all", tmp_path / "one", 1e-12)


@pytest.mark.parametrize("way", ["ddp", slow("fsdp")])
def test_diagnostics_are_those_of_all_processes(way, tmp_path):
    arguments = *SMALL, "dtype=float64", "logger.diagnostics=true"
    command(*arguments, "run.dir=one", cwd=tmp_path)
    job(*arguments, "run.dir=all", f"parallel={way}", processes=2, cwd=tmp_path)
    one, both = (lines(tmp_path / name / "private", "diagnostics.jsonl") for name in ("one", "all"))
    for expected, found in zip(one, both, strict=True):
        assert found == pytest.approx(expected, rel=1e-9)


SLOW = "import time; from dpsgd import trainer; take = trainer.Trainer._take\n"
SLOW += "trainer.Trainer._take = lambda self, n: (time.sleep(0.3), take(self, n))[1]"


def under_way(run, steps):
    """Waits until so many steps are charged."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "ledger.jsonl").exists() and len(lines(run)) > steps:
            return
        time.sleep(0.05)
    raise AssertionError("the job did not get to its steps")


@pytest.mark.parametrize("way", [slow("ddp"), "fsdp"])
def test_an_interrupted_job_goes_on_where_it_was(way, tmp_path):
    arguments = *SMALL, f"parallel={way}", "trainer.num_steps=8", "optimizer=adam"
    job(*arguments, "run.dir=whole", processes=2, cwd=tmp_path)
    started = Job(*arguments, "run.dir=run", processes=2, cwd=tmp_path, before=SLOW)
    under_way(tmp_path / "run", 3)
    started.send(signal.SIGTERM)
    done = started.wait()
    assert [one.returncode for one in done] == [130, 130]
    assert "torchrun --nproc-per-node=2 -m dpsgd.train resume=run" in done[0].stdout
    again = job("resume=run", processes=2, cwd=tmp_path)
    assert "exactly where it was" in again[0].stdout
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "run")[name], weight)
    assert len(lines(tmp_path / "run")) == len(lines(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("way", "dead"), [("ddp", 0), ("fsdp", 1), slow("ddp", 1), slow("fsdp", 0)]
)
def test_a_dead_process_ends_the_job_with_one_message_and_one_charge(way, dead, tmp_path):
    arguments = *SMALL, f"parallel={way}", "trainer.num_steps=8", "checkpoint.every=1"
    started = Job(*arguments, "run.dir=run", processes=3, cwd=tmp_path, before=SLOW)
    under_way(tmp_path / "run", 3)
    started.processes[dead].send(signal.SIGKILL)
    begun = time.monotonic()
    done = started.wait(timeout=60)
    assert time.monotonic() - begun < 60
    assert done[dead].returncode == -signal.SIGKILL
    others = [one for rank, one in enumerate(done) if rank != dead]
    assert all(one.returncode == 2 for one in others)
    said = "".join(one.stderr for one in others)
    assert said.count("A process of this job has ended") == 1
    assert "Traceback" not in said
    steps = [line["step"] for line in lines(tmp_path / "run") if "step" in line]
    assert len(steps) == len(set(steps))
    job("resume=run", processes=3, cwd=tmp_path)
    steps = [line["step"] for line in lines(tmp_path / "run") if "step" in line]
    assert len(set(steps)) == 8
    assert json.loads((tmp_path / "run/report.json").read_text())["steps"] == 8


@pytest.mark.parametrize("after", [("single", 1), slow(("ddp", 2)), slow(("fsdp", 3))])
def test_a_sharded_run_goes_on_in_another_shape_as_a_new_attempt(after, tmp_path):
    way, processes = after
    arguments = *SMALL, "trainer.num_steps=8", "optimizer=adam"
    started = Job(
        *arguments, "parallel=fsdp", "run.dir=run", processes=2, cwd=tmp_path, before=SLOW
    )
    under_way(tmp_path / "run", 2)
    started.send(signal.SIGTERM)
    started.wait()
    (done, *_) = job("resume=run", f"parallel={way}", processes=processes, cwd=tmp_path)
    said = " ".join(done.stdout.replace("│", " ").split())
    assert "goes on from step" in said
    assert "parallel._target_ was dpsgd.parallel.fsdp" in said or "processes was 2 and is 3" in said
    assert json.loads((tmp_path / "run/report.json").read_text())["steps"] == 8


@pytest.mark.slow
def test_a_damaged_shard_is_passed_over(tmp_path):
    arguments = *SMALL, "parallel=fsdp", "checkpoint.every=1"
    started = Job(*arguments, "run.dir=run", processes=2, cwd=tmp_path, before=SLOW)
    under_way(tmp_path / "run", 3)
    started.send(signal.SIGTERM)
    started.wait()
    newest = max((tmp_path / "run/checkpoints").glob("*.shards"), key=lambda p: p.stat().st_mtime)
    shard = sorted(newest.iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    (done, _) = job("resume=run", processes=2, cwd=tmp_path)
    assert "Passed over a damaged checkpoint" in done.stdout


def outcome(done):
    """The one message of a job that all processes of which failed."""
    assert all(one.returncode == 2 for one in done), done
    said = [one.stderr for one in done if one.stderr]
    assert len(said) == 1, said
    assert "Traceback" not in said[0]
    return said[0]


@pytest.mark.parametrize(
    ("different", "words"),
    [
        ({"arguments": ["optimizer.lr=0.7"]}, "optimizer.lr: process 0: 0.5, process 1: 0.7"),
        ({"before": "from dpsgd import replay; replay._version = lambda name: 'odd'"},
         "torch: process 0: "),
        ({"before": "import dpsgd.data as d; load = d.digits\n"
                    "def other(*a, **k):\n made = load(*a, **k); made.train[0][0, 0] += 1\n"
                    " return made\nd.digits = other"},
         "Expected the same training records in all 2 processes"),
    ],
)  # fmt: skip
def test_processes_that_differ_are_found_at_the_start(different, words, tmp_path):
    arguments = *SMALL, "parallel=ddp", "run.dir=run", "optimizer.lr=0.5"
    done = job(*arguments, processes=2, cwd=tmp_path, different={1: different}, check=False)
    assert words in outcome(done)
    assert not (tmp_path / "run/ledger.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("parallel=fsdp", "engine=vmap"), "Expected engine=ghost for parallel=fsdp, got Vmap"),
        ((), "Expected parallel=ddp or parallel=fsdp in a job of 2 processes"),
        (("parallel=ddp", "model=cnnn"), "Could not find 'model/cnnn'"),
        (("parallel=ddp", "sweep=random_stopping"), "got a sweep"),
        (("-m", "parallel=ddp", "seed=1,2"), "got a sweep"),
    ],
)
def test_a_job_that_cannot_work_says_so_once(arguments, words, tmp_path):
    done = job(*SMALL, "run.dir=run", *arguments, processes=2, cwd=tmp_path, check=False)
    assert words in outcome(done)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_without_torchrun_it_says_how_to_start(way, tmp_path):
    done = command(*SMALL, f"parallel={way}", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "torchrun --nproc-per-node=N -m dpsgd.train parallel=ddp" in done.stderr


@pytest.mark.slow
def test_a_straggler_is_waited_for(tmp_path):
    slow = {"before": SLOW.replace("0.3", "2")}
    arguments = *SMALL, "trainer.num_steps=2", "dtype=float64"
    command(*arguments, "run.dir=one", cwd=tmp_path)
    job(*arguments, "run.dir=all", "parallel=fsdp", processes=2, cwd=tmp_path, different={1: slow})
    assert_same(tmp_path / "all", tmp_path / "one", 1e-12)


def test_torchrun_itself(tmp_path):
    import subprocess
    import sys

    from command_line import environment

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    arguments = *SMALL, "parallel=fsdp", "run.dir=run", "trainer.num_steps=2"
    done = subprocess.run(
        [*torchrun, "-m", "dpsgd.train", *arguments],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training finished") == 1
    shutil.rmtree(tmp_path / "run/private")
    assert dpsgd_report(tmp_path / "run")["steps"] == 2


def dpsgd_report(run):
    import dpsgd

    return dpsgd.load_run(run).report
