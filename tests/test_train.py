"""`python -m dpsgd.train`, through the real command line."""

import json
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from command_line import Running, command
from safetensors.torch import load_file

import dpsgd
from dpsgd.rng import fresh_key

KEY = "privacy.key='" + "ab" * 32 + "'"
SHORT = ("trainer.num_steps=3", "device=cpu")
FAST = (*SHORT, "accountant=rdp", "sampler.sample_rate=0.05")


def slow(*arguments):
    return pytest.param(arguments, marks=pytest.mark.slow)


def everything_below(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run with diagnostics, in a folder with a space and non-ASCII letters."""
    folder = tmp_path_factory.mktemp("a föl der")
    done = command(*SHORT, "run.dir=läuft hier", "logger.diagnostics=true", cwd=folder)
    return folder / "läuft hier", done.stdout


def test_a_run_leaves_what_it_promises(finished):
    run, _ = finished
    names = {path.name for path in run.iterdir()}
    assert names == {
        "checkpoints",
        "config.yaml",
        "ledger.jsonl",
        "metrics.jsonl",
        "model.safetensors",
        "private",
        "report.html",
        "report.json",
        "tensorboard",
    }
    assert list((run / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert {"test/accuracy", "test/loss", "privacy/epsilon"} <= lines[-2].keys()
    assert "optimizer/learning_rate" in lines[0]
    assert [line for line in lines if "speed/expected_records_per_second" in line] == lines[-1:]


def test_the_summary_states_the_guarantee(finished):
    _, out = finished
    for words in ("test accuracy", "epsilon 2.9", "delta 1e-05", "add/remove", "3 of 3"):
        assert words in out
    assert "NOT PRIVATE" not in out


def test_private_things_are_in_the_locked_drawer_only(finished):
    run, _ = finished
    assert stat.S_IMODE((run / "private").stat().st_mode) == 0o700
    assert not (run / "private" / "key").exists(), "the key is destroyed when the run completes"
    secret = (run / "private" / "diagnostics.jsonl").read_text()
    assert "NOT_PRIVATE/train_loss" in secret
    for path, content in everything_below(run).items():
        if run / "private" not in path.parents:
            assert b"train_loss" not in content
            assert b"drawn_batch_size" not in content


def test_load_run_gives_back_model_config_and_report(finished):
    run, _ = finished
    model, config, report = dpsgd.load_run(run)
    assert not model.training
    assert config.trainer.num_steps == 3
    assert report["steps"] == 3
    assert report["private"]
    assert report["epsilon"] <= 3
    saved = load_file(run / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_a_directory_that_holds_a_run_is_refused(finished):
    run, _ = finished
    before = everything_below(run)
    done = command(*SHORT, f"run.dir={run.name}", cwd=run.parent, check=False)
    assert done.returncode == 2
    assert "holds a run" in done.stderr
    assert everything_below(run) == before


def test_training_goes_on_from_saved_weights(finished, tmp_path):
    run, _ = finished
    start = f"model.init_from='{run / 'model.safetensors'}'"
    command("optimizer.lr=0", start, *SHORT, "run.dir=next", cwd=tmp_path)
    saved, copied = (load_file(r / "model.safetensors") for r in (run, tmp_path / "next"))
    assert all(torch.equal(saved[name], copied[name]) for name in saved)


def test_a_sweep_over_engines_gives_the_same_training(tmp_path):
    done = command(
        "-m",
        "engine=loop,hooks,vmap,opacus,ghost",
        *FAST,
        KEY,
        "dtype=float64",
        "run.dir=s",
        cwd=tmp_path,
    )
    runs = sorted(path for path in (tmp_path / "s").iterdir() if path.is_dir())
    assert len(runs) == 5
    weights = [load_file(run / "model.safetensors") for run in runs]
    for other in weights[1:]:
        for name in other:
            torch.testing.assert_close(other[name], weights[0][name], rtol=1e-9, atol=1e-12)
    assert done.stdout.count("NOT PRIVATE") >= 5
    assert all(not json.loads((run / "report.json").read_text())["private"] for run in runs)
    for path, content in everything_below(tmp_path).items():
        assert b"abababab" not in content, f"the key is in {path}"


def test_a_seed_and_key_repeat_a_run_bit_for_bit(tmp_path):
    for name in ("a", "b"):
        command(*FAST, KEY, "seed=5", f"run.dir={name}", cwd=tmp_path)
    first, second = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_runs_without_a_key_differ(tmp_path):
    for name in ("a", "b"):
        command(*FAST, f"run.dir={name}", cwd=tmp_path)
    first, second = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ("model=mlp", "engine=hooks", "optimizer=adam"),
        slow("optimizer._target_=torch.optim.RMSprop", "optimizer.lr=0.001", "model=linear"),
        ("privacy.noise_multiplier=5", "trainer.epochs=2", "sampler.expected_batch_size=700"),
        ("model=lstm", "engine=vmap", "accountant=rdp", "sampler.sample_rate=0.05"),
        ("model=transformer", "engine=hooks", "dtype=bfloat16", "sampler.sample_rate=0.05"),
        ("data=synthetic", "model=linear", "privacy.adjacency=replace_one"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_combinations_train(arguments, tmp_path):
    steps = () if any("epochs" in argument for argument in arguments) else SHORT[:1]
    command(*arguments, *steps, "device=cpu", "run.dir=r", cwd=tmp_path)
    assert (tmp_path / "r" / "report.json").exists()


def test_the_users_own_engine_model_and_data(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom dpsgd.engines import Loop\nfrom dpsgd.data import Dataset\n"
        "class Engine(Loop):\n    pass\n"
        "class Net(torch.nn.Sequential):\n"
        "    def __init__(self, width: int):\n"
        "        super().__init__(torch.nn.Linear(3, width), torch.nn.Linear(width, 2))\n"
        "def data(input_shape, num_classes, public_size, vocab_size=None):\n"
        "    x = torch.randn(20, 3)\n"
        "    return Dataset((x, (x.sum(1) > 0).long()), None, input_shape, num_classes,\n"
        "                   public_size)\n"
    )
    for group, text in {
        "engine": "_target_: mine.Engine\n_partial_: true\n",
        "model": "_target_: mine.Net\nwidth: 5\n",
        "data": "_target_: mine.data\ninput_shape: [3]\nnum_classes: 2\npublic_size: 20\n"
        "vocab_size: null\n",
    }.items():
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "mine.yaml").write_text(text)
    done = command(
        "--config-dir",
        "conf",
        "engine=mine",
        "model=mine",
        "data=mine",
        *SHORT,
        "run.dir=r",
        cwd=tmp_path,
    )
    assert "no test set: none is claimed" in done.stdout
    config = (tmp_path / "r" / "config.yaml").read_text()
    assert "mine.Engine" in config


def test_tensors_of_the_users_own_without_a_test_set(tmp_path):
    import numpy as np

    x = np.random.default_rng(0).normal(size=(30, 4)).astype("float32")
    np.savez(tmp_path / "own.npz", x=x, y=(x[:, 0] > 0).astype("int64"))
    done = command(
        "data=tensors",
        "data.path=own.npz",
        "data.input_shape=[4]",
        "data.num_classes=2",
        "data.public_size=30",
        "model=linear",
        *SHORT,
        "run.dir=r",
        cwd=tmp_path,
    )
    assert "none is claimed" in done.stdout
    assert json.loads((tmp_path / "r" / "report.json").read_text())["test"] == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["engine=vmapp"], "Available options in 'engine'"),
        (["modell=cnn"], "Did you mean model"),
        (["trainer.num_stepz=3"], "Did you mean trainer.num_steps"),
        (["+nonsense=3"], "no setting 'nonsense'"),
        (["engine=vmap", "+engine.chunksize=3"], "Did you mean chunk_size"),
        (["engine=vmap", "engine.chunk_size=many"], "engine.chunk_size to be int"),
        (["trainer.num_steps=ten"], "trainer.num_steps"),
        (["trainer.num_steps=0"], "num_steps >= 1"),
        (["trainer.num_steps=5", "trainer.epochs=2"], "exclude each other"),
        (["privacy.target_epsilon=1", "privacy.noise_multiplier=2"], "exclude each other"),
        (["sampler.sample_rate=0.1", "sampler.expected_batch_size=9"], "exclude each other"),
        (["privacy.noise_multiplier=0"], "Without noise"),
        (["privacy.noise_multiplier=-1"], "noise_multiplier"),
        (["privacy.target_epsilon=-1"], "target_epsilon"),
        (["privacy.target_delta=2"], "delta"),
        (["privacy.adjacency=zero"], "adjacency"),
        (["privacy.adjacency=replace_one", "accountant=rdp"], "under-reports"),
        (["privacy.key=1234"], "64 hexadecimal digits"),
        (["clipping.max_grad_norm=0"], "max_grad_norm"),
        (["clipping.max_grad_norm=abc"], "max_grad_norm to be float"),
        (["sampler.sample_rate=1.5"], "sample_rate"),
        (["sampler.expected_batch_size=5000"], "expected_batch_size"),
        (["device=tpu"], "device cpu, cuda"),
        (["dtype=int8"], "dtype"),
        (["seed=-1"], "seed"),
        (["optimizer._target_=torch.optim.SGDD"], "Did you mean SGD"),
        (["optimizer._target_=torch.optim.LBFGS"], "LBFGS"),
        (["optimizer.lr=-1"], "learning rate"),
        (["model.channels=abc"], "channels"),
        (["data=tensors"], "data.path"),
        (["data=tensors", "data.path=no.npz", "data.input_shape=[2]", "data.num_classes=2",
          "data.public_size=5"], "no.npz"),
        (["model=lstm", "engine=hooks"], "No rule for these trainable parameters"),
        (["model.init_from=no.safetensors"], "no.safetensors"),
        (["trainer.physical_batch_size=0"], "physical_batch_size"),
        (["sampler.public_size=null"], "public_size"),
        (["privacy.noise_multiplier=1e-9"], "epsilon"),
        (["clipping.max_grad_norm=1e39"], "max_grad_norm"),
        (["sampler._target_=torch.nn.Identity"], "Identity"),
        (["optimizer._target_=torch.optim.SparseAdam"], "SparseAdam"),
        (["lr=0.1"], "Did you mean optimizer.lr"),
        (["privacy.target_delta=0.001"], "delta < 1 / public size"),
        (["model._target_=torch.nn.Identity"], "Move the classes"),
        (["model=linear", "loss=mse"], "one output per target"),
    ],
    ids=lambda value: "-".join(value)[:60] if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_gives_one_message_and_writes_nothing(arguments, words, tmp_path):
    done = command(*arguments, "run.dir=r", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path):
    done = command("debug=true", "seed=-1", cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_an_error_does_not_show_the_key(tmp_path):
    key = fresh_key().hex()
    done = command(f"privacy.key='{key}'", "optimizer.lr=-1", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert key not in done.stdout + done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_an_interrupt_saves_the_model_and_says_how_to_go_on(sent, tmp_path):
    running = Running(
        "run.dir=r r", "trainer.num_steps=5000", "model=linear", "accountant=rdp", cwd=tmp_path
    )
    run = tmp_path / "r r"
    await_lines(run / "ledger.jsonl", 5)
    assert stat.S_IMODE((run / "private" / "key").stat().st_mode) == 0o600
    running.send(sent)
    done = running.wait()
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "stopping after this step" in done.stderr
    report = json.loads((run / "report.json").read_text())
    assert 0 < report["steps"] < 5000
    assert report["interrupted"]
    assert report["epsilon"] < 3
    assert f"{report['steps']} of 5000" in done.stdout
    assert "training interrupted" in done.stdout
    assert "Go on with: python -m dpsgd.train resume='r r'" in done.stdout
    assert (run / "private" / "key").exists(), "it is needed to go on"


def test_a_second_signal_exits_at_once(tmp_path):
    slow = (
        "import time; from dpsgd.trainer import Trainer; Trainer._take = lambda *_: time.sleep(99)"
    )
    running = Running("run.dir=r", *SHORT, cwd=tmp_path, before=slow)
    await_lines(tmp_path / "r" / "ledger.jsonl", 2)
    running.send(signal.SIGTERM)
    time.sleep(0.3)
    running.send(signal.SIGINT)
    assert running.wait(20).returncode == 128 + signal.SIGINT


def await_lines(path, count):
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_load_run_keeps_the_dtype(tmp_path):
    command(*SHORT, "dtype=float64", "model=linear", "run.dir=r", cwd=tmp_path)
    model = dpsgd.load_run(tmp_path / "r").model
    saved = load_file(tmp_path / "r" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float64
        assert torch.equal(value, saved[name])


@pytest.mark.parametrize("damage", ["missing", "truncated", "nonsense"])
def test_load_run_refuses_broken_files(damage, finished, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(finished[0], run)
    weights = run / "model.safetensors"
    if damage == "missing":
        (run / "report.json").unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        (run / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"Expected"):
        dpsgd.load_run(run)
