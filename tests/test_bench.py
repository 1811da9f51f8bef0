import io
import json
import statistics
from pathlib import Path

import pytest
import torch
from command_line import command
from hydra import compose, initialize_config_dir
from rich.console import Console

import dpsgd
from dpsgd.bench import bench, sweep
from dpsgd.benchmark.memory import in_fresh_process
from dpsgd.benchmark.systems import BASELINE, System, Workload
from dpsgd.config import config_dir, resolve

ROOT = Path(dpsgd.__file__).parents[1]
KEY = "5ca1ab1e" * 8
SMALL = [
    "device=cpu",
    "data.input_shape=[6,6]",
    "data.num_train=20",
    "bench.batch_size=5",
    "bench.repetitions=3",
    "bench.memory=false",
]


def run(path, *overrides):
    """The benchmark in this process: (results, bench.json, what was printed)."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        typed = [*SMALL, *overrides]
        config = resolve(compose("bench", overrides=typed), typed)
        console = Console(file=io.StringIO(), width=150)
        results = bench(config, path, console)
    return results, json.loads((path / "bench.json").read_text()), console.file.getvalue()


@pytest.fixture(scope="module")
def lstm(tmp_path_factory):
    """An LSTM, which some engines refuse, with memory in fresh processes."""
    path = tmp_path_factory.mktemp("runs") / "lstm"
    engines = "bench.engines=[loop,hooks,{vmap:{chunk_size:2}}]"
    extra = ["bench.memory=true", f"+privacy.key='{KEY}'"]
    return path, *run(path, "model=lstm", "model.hidden_size=4", engines, *extra)


def by_name(report):
    return {row["name"]: row for row in report["systems"]}


def test_every_system_has_a_row_in_order(lstm):
    *_, report, _ = lstm
    assert list(by_name(report)) == ["non-private", "loop", "hooks", "vmap-chunk_size=2"]


def test_ratios_are_those_of_the_medians_of_the_raw_times(lstm):
    *_, report, _ = lstm
    rows = by_name(report)
    baseline = statistics.median(rows["non-private"]["seconds"])
    for row in rows.values():
        if row["refusal"] is None:
            assert len(row["seconds"]) == 3
            assert row["median_seconds"] == statistics.median(row["seconds"])
            assert row["ratio"] == row["median_seconds"] / baseline
    assert rows["non-private"]["ratio"] == 1


def test_an_engine_that_refuses_the_model_is_listed_with_its_reason(lstm):
    *_, report, printed = lstm
    row = by_name(report)["hooks"]
    assert "lstm.weight_ih_l0" in row["refusal"]
    assert row["seconds"] == []
    assert row["ratio"] is row["memory"] is None
    assert "refused: No rule" in printed


def test_memory_is_measured_in_processes_of_their_own(lstm):
    *_, report, _ = lstm
    for name, row in by_name(report).items():
        if name != "hooks":
            assert row["memory"]["peak_mib"] > 0
            assert row["memory"]["method"]


def test_the_circumstances_are_kept_and_the_key_is_not(lstm):
    path, _, report, _ = lstm
    assert report["versions"]["torch"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()
    assert report["config"]["model"]["hidden_size"] == 4
    assert report["config"]["bench"]["repetitions"] == 3
    assert KEY not in (path / "bench.json").read_text()


def test_the_chart_is_a_picture(lstm):
    path, *_ = lstm
    picture = (path / "bench.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_opacus_is_measured_in_all_its_modes(tmp_path):
    _, report, _ = run(tmp_path, "model=linear", "bench.engines=[opacus]", "bench.repetitions=1")
    rows = by_name(report)
    modes = ["opacus-hooks", "opacus-functorch", "opacus-ew", "opacus-ghost"]
    assert list(rows) == ["non-private", *modes]
    assert all(rows[mode]["ratio"] > 0 for mode in modes)


def test_a_system_over_its_time_says_how_many_repetitions_it_got(tmp_path):
    _, report, _ = run(tmp_path, "model=linear", "bench.engines=[loop]", "bench.max_seconds=1e-9")
    row = by_name(report)["loop"]
    assert len(row["seconds"]) == 1
    assert row["note"].startswith("1 of 3 repetitions")


def test_each_system_starts_from_equal_weights_of_its_own():
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = resolve(compose("bench", overrides=[*SMALL, "model=linear"]), [])
    workload = Workload.from_config(config)
    before = {name: p.clone() for name, p in workload.model.named_parameters()}
    workload.step(System(BASELINE, None))()
    after = dict(workload.model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)
    again = dict(Workload.from_config(config).model.named_parameters())
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_a_mistake_in_the_memory_process_is_shown():
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = resolve(compose("bench", overrides=[*SMALL, "model=linear"]), [])
    config = Workload.from_config(config).config
    broken = System("broken", {"_target_": "builtins.len", "_partial_": True})
    with pytest.raises(RuntimeError, match=r"(?s)broken failed.*TypeError"):
        in_fresh_process(config, broken)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bench.engines=[nobody]", "ghost, hooks, loop, opacus, vmap.*got 'nobody'"),
        ("bench.engines=[]", "at least one engine"),
        ("bench.engines=[vmap,vmap]", r"\['vmap'\] repeated"),
        ("bench.engines=[non-private]", "non-private: {compile: true}"),
        ("bench.engines=[{opacus:{mode:gost}}]", "opacus-gost: .*got 'gost'"),
        ("bench.engines=[{opacus:{mod:ghost}}]", "takes no 'mod'"),
        ("bench.batch_size=0", "batch_size >= 1, got 0"),
        ("bench.warmup=0", "warmup >= 1, got 0"),
        ("bench.batch_size=many", "Wrong setting bench.batch_size"),
        ("privacy.noise_multiplier=-1", "noise_multiplier >= 0, got -1"),
        ("optimizer._target_=torch.optim.LBFGS", "one dense gradient per step"),
        ("loss=mse", "one output per target"),
    ],
)
def test_bad_settings_are_told_before_anything_is_written(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "new", override)
    assert not (tmp_path / "new").exists()


def test_results_are_never_overwritten(tmp_path):
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ValueError, match="holds results"):
        run(tmp_path, "model=linear", "bench.engines=[vmap]")


def test_the_command_shows_a_table_and_writes_its_files(tmp_path):
    words = (*SMALL, "model=linear", "bench.engines=[hooks]", "bench.dir=here")
    done = command(*words, module="dpsgd.bench", cwd=tmp_path)
    assert "non-private" in done.stdout
    assert "hooks" in done.stdout
    assert {p.name for p in (tmp_path / "here").iterdir()} == {"bench.json", "bench.png"}


def test_a_bad_setting_is_one_line_and_status_2(tmp_path):
    words = (*SMALL, "bench.engines=[nobody]", "bench.dir=here")
    done = command(*words, module="dpsgd.bench", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: Expected bench.engines to name")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_sweep_measures_every_value_and_draws_curves(tmp_path):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        typed = [*SMALL, "model=linear", "bench.engines=[vmap]", "bench.repetitions=1"]
        typed += ["bench.sweep={bench.batch_size:[2,4,8]}"]
        config = resolve(compose("bench", overrides=typed), typed)
        found = sweep(config, tmp_path / "here", Console(file=io.StringIO(), width=150))
    report = json.loads((tmp_path / "here" / "bench.json").read_text())
    assert report["sweep"] == "bench.batch_size"
    assert report["values"] == [2, 4, 8]
    sizes = [result["config"]["bench"]["batch_size"] for result in report["results"]]
    assert sizes == [results.workload.config.bench.batch_size for results in found] == [2, 4, 8]
    assert all(by_name(result)["vmap"]["ratio"] > 0 for result in report["results"])
    assert (tmp_path / "here" / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bench.sweep={bench.batch_size:[2]}", "at least two values"),
        ("bench.sweep={bench.batch_size:8}", "at least two values"),
        ("bench.sweep={bench.batch_size:[2,4],seed:[0,1]}", "at least two values"),
        ("bench.sweep={bench.size:[2,4]}", "no 'bench.size'"),
        ("bench.sweep={bench.batch_size:[2,0]}", "batch_size >= 1, got 0"),
    ],
)
def test_a_sweep_of_nonsense_is_told_before_anything_is_measured(setting, message, tmp_path):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = resolve(compose("bench", overrides=[*SMALL, setting]), [])
        with pytest.raises(ValueError, match=message):
            sweep(config, tmp_path / "new", Console(file=io.StringIO()))
    assert not (tmp_path / "new").exists()


def test_a_system_may_run_another_model(tmp_path):
    engines = "bench.engines=[vmap,{vmap:{chunk_size:2,model:{widths:[3]}}}]"
    results, report, _ = run(tmp_path, "model=mlp", "model.widths=[5]", engines)
    assert list(by_name(report))[1:] == ["vmap", "vmap-chunk_size=2"]
    other = System("other", None, {"widths": [3]})
    assert results.workload._model(other)(torch.rand(2, 6, 6)).shape == (2, 10)
    assert any(p.shape[0] == 3 for p in results.workload._model(other).parameters())


def test_page_faults_of_steps_are_reported(lstm):
    *_, report, _ = lstm
    assert by_name(report)["vmap-chunk_size=2"]["page_faults"] >= 0


@pytest.mark.slow
def test_ordinary_training_is_measured_compiled_too(tmp_path):
    entry = "bench.engines=[{non-private:{compile:true}}]"
    _, report, _ = run(tmp_path, "model=linear", entry)
    assert by_name(report)["non-private-compile"]["ratio"] > 0
