"""`python -m dpsgd.account`, and what sweeps spend, through the real command line."""

import json
import re
import shutil

import pytest
from command_line import command

from dpsgd import accounting, ledger
from dpsgd.run_directory import charged

SMALL = ("trainer.num_steps=3", "device=cpu", "model=linear")


def account(*arguments, cwd, check=True):
    return command(*arguments, cwd=cwd, module="dpsgd.account", check=check)


def figure(words, text):
    return float(re.search(words + r"[^\d]*([\d.]+)", text)[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    command(*SMALL, "run.dir=r", cwd=folder)
    return folder / "r"


def test_a_plan_is_accounted_for_without_data(tmp_path):
    out = account(
        "data=tensors", "data.path=nowhere.npz", "data.input_shape=[3]", "data.num_classes=2",
        "data.public_size=5000", "sampler.sample_rate=0.02", "trainer.num_steps=500",
        "privacy.noise_multiplier=1.5", "account.plot=plan.png", cwd=tmp_path,
    ).stdout  # fmt: skip
    figures = {"sample_rate": 0.02, "noise_multiplier": 1.5, "num_steps": 500, "delta": 1e-5}
    assert figure("epsilon", out) == pytest.approx(accounting.epsilon(**figures), abs=1e-4)
    rdp = accounting.epsilon(**figures, accountant="rdp")
    assert figure("RDP:", out) == pytest.approx(rdp, abs=1e-4)
    assert "mu " in out
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_it_solves_for_steps_and_for_the_rate(tmp_path):
    common = ("privacy.noise_multiplier=4", "privacy.target_epsilon=2")
    steps = account("account.solve=num_steps", "sampler.sample_rate=0.1", *common, cwd=tmp_path)
    expected = accounting.calibrate_num_steps(
        target_epsilon=2, sample_rate=0.1, noise_multiplier=4, delta=1e-5
    )
    assert f" {expected} (" in steps.stdout
    rate = account("account.solve=sample_rate", "trainer.num_steps=50", *common, cwd=tmp_path)
    assert figure("epsilon", rate.stdout) == pytest.approx(2, rel=1e-3)


def test_shuffling_is_said_to_be_dear(tmp_path):
    out = account("sampler=shuffled", "privacy.adjacency=replace_one", cwd=tmp_path).stdout
    assert "no amplification" in re.sub(r"[\s│]+", " ", out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["account.solve=num_steps"], "noise_multiplier to solve"),
        (["account.solve=luck", "privacy.noise_multiplier=3"], "num_steps or sample_rate"),
        (["account.solve=num_steps", "privacy.noise_multiplier=0.1"], "one step"),
        (["account.solve=sample_rate", "privacy.noise_multiplier=3", "sampler=truncated_poisson"],
         "solve for sample_rate"),
        (["sampler=shuffled"], "theorem covers"),
        (["sampler=truncated_poisson", "accountant=rdp"], "theorem covers"),
        (["account.plot=x.mp3"], "account.plot"),
        (["account.plot=no/such/folder.png"], "account.plot"),
        (["ledger=nowhere"], "Expected a ledger"),
        (["sampler=user_poisson"], "sampler.public_size"),
        (["clipping=grouped"], "clipping.patterns"),
        (["clipping.schedule={5:1.0}"], "starts at step 0"),
        (["privacy.noise_schedule={0:-1}"], "factor > 0"),
        (["clipping=adaptive", "clipping.quantile=1.5"], "quantile"),
        (["clipping.schedule=3"], "schedule as {step: factor}"),
        (["privacy.noise_schedule=[1,2]"], "schedule as {step: factor}"),
        (["privacy.noise_multiplier=1e300"], "noise_multiplier <= 1000"),
        (["privacy.target_epsilon=0.0001"], "noise_multiplier <= 1000"),
        (["clipping=grouped", "clipping.patterns=3"], "clipping.patterns"),
        (["clipping=grouped", "clipping.patterns={a:[1]}"], "clipping.patterns"),
        (["clipping=grouped", "clipping.patterns={a:'*'}", "clipping.shares=2"], "clipping.shares"),
    ],
)  # fmt: skip
def test_bad_input_gives_one_message(arguments, words, tmp_path):
    done = account(*arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_runs_ledger_is_verified_and_accounted_anew(run):
    done = account(f"ledger={run}", cwd=run.parent)
    for words in ("verified", "3 charged of 3", "agrees", "ended"):
        assert words in done.stdout
    report = json.loads((run / "report.json").read_text())
    assert charged(run).epsilon() == report["epsilon"]


def test_a_report_that_claims_less_is_found_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    (tmp_path / "r" / "report.json").write_text(json.dumps({**report, "epsilon": 0.5}))
    done = account("ledger=r", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "DISAGREES" in done.stdout


def test_an_edited_ledger_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    file = tmp_path / "r" / "ledger.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], *lines[2:]]))
    done = account("ledger=r", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "HMAC" in done.stderr


def test_without_its_key_a_ledger_is_read_and_said_to_be_unverified(run, tmp_path):
    shutil.copy(run / "ledger.jsonl", tmp_path / "copy.jsonl")
    assert "not verified" in account("ledger=copy.jsonl", cwd=tmp_path).stdout


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    done = command("-m", *SMALL, "optimizer.lr=0.1,0.4", "run.dir=s", cwd=folder)
    return folder / "s", done.stdout


def test_a_sweep_is_charged_by_composition(swept):
    folder, out = swept
    entry = json.loads((folder / "sweep.json").read_text())
    runs = sorted(path.parent for path in folder.glob("*/ledger.jsonl"))
    assert len(runs) == entry["runs"] == 2
    noise = charged(runs[0]).plan["noise_multiplier"]
    together = accounting.epsilon(sample_rate=1.0, noise_multiplier=noise, num_steps=6, delta=1e-5)
    assert entry["epsilon"] == pytest.approx(together, rel=1e-6)
    assert f"epsilon {together:.3f}" in re.sub(r"\s+", " ", out)
    for run in runs:
        report = json.loads((run / "report.json").read_text())
        assert report["sweep"]["epsilon"] == entry["epsilon"] > report["epsilon"]
    scores = [json.loads((run / "report.json").read_text())["test"] for run in runs]
    best = max(range(2), key=lambda i: scores[i]["test_accuracy"])
    assert entry["best"] == runs[best].name


def test_a_failed_run_of_a_sweep_is_charged(tmp_path):
    from dpsgd.sweeps import compose

    plan = {
        "sampling": {"sampler": "poisson", "sample_rate": 1.0}, "unit": "record", "num_steps": 4,
        "noise_multiplier": 3.0, "delta": 1e-5, "adjacency": "add_remove", "accountant": "pld",
    }  # fmt: skip
    for name, steps in (("a", 4), ("b", 1)):
        book = ledger.Ledger(tmp_path / name, bytes(32), plan)
        for step in range(steps):
            book.intend(step, 3.0)
        book.close()  # b stopped in its first step
    spent = compose([ledger.read(tmp_path / name) for name in "ab"])
    together = accounting.epsilon(sample_rate=1.0, noise_multiplier=3.0, num_steps=5, delta=1e-5)
    assert spent.epsilon == pytest.approx(together, rel=1e-6)


def test_different_accountants_add_up(tmp_path):
    from dpsgd.sweeps import compose

    plan = {
        "sampling": {"sampler": "poisson", "sample_rate": 1.0}, "unit": "record", "num_steps": 4,
        "noise_multiplier": 3.0, "delta": 1e-5, "adjacency": "add_remove",
    }  # fmt: skip
    for name in ("pld", "rdp"):
        book = ledger.Ledger(tmp_path / name, bytes(32), {**plan, "accountant": name})
        book.intend(0, 3.0)
        book.close()
    ledgers = [ledger.read(tmp_path / name) for name in ("pld", "rdp")]
    spent = compose(ledgers)
    assert spent.epsilon == sum(each.epsilon() for each in ledgers)
    assert spent.delta == 2e-5


OVER = "sweep.over={optimizer.lr:[0.1,0.4],optimizer.momentum:[0.0,0.9]}"


def test_random_stopping_releases_the_winner_alone(tmp_path):
    done = command(*SMALL, "sweep=random_stopping", OVER, "sweep.mean=3", "run.dir=r", cwd=tmp_path)
    run = tmp_path / "r"
    assert {path.name for path in run.iterdir()} >= {"report.json", "model.safetensors"}
    assert [path.name for path in (run / "private").iterdir()] == ["ledger_key"]
    report = json.loads((run / "report.json").read_text())
    assert report["sweep"]["epsilon"] > report["epsilon"]
    assert "of the sweep" in done.stdout
    assert "runs" not in report["sweep"], "their number is secret"
    assert charged(run).verified


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "sweep.over"),
        (["sweep.over=3"], "sweep.over="),
        (["sweep.over={optimizer.lr:0.1}"], "list of values"),
        (["sweep.over={optimizer.speed:[1,2]}"], "no setting 'optimizer.speed'"),
        (["sweep.over={trainer.num_steps:[1,2]}"], "same privacy plan"),
        ([OVER, "sweep.mean=0.5"], "sweep.mean > 1"),
        ([OVER, "sweep.shape=-1"], "sweep.shape >= 0"),
        ([OVER, "accountant=rdp", "privacy.adjacency=replace_one"], "under-reports"),
        ([OVER, "privacy.adjacency=replace_one"], "under-reports"),
    ],
)
def test_senseless_random_stopping_is_refused(arguments, words, tmp_path):
    done = command(*SMALL, "sweep=random_stopping", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mean", "shape"), [(3.0, 0.0), (5.0, 1.0), (2.0, 0.5)])
def test_the_number_of_runs_has_the_law_that_is_accounted(mean, shape):
    from scipy import stats

    from dpsgd.random_stopping import _gamma, number_of_runs

    drawn = [number_of_runs(mean, shape, i.to_bytes(32, "big")) for i in range(4000)]
    assert min(drawn) == 1
    assert sum(drawn) / 4000 == pytest.approx(mean, rel=0.1)
    gamma = _gamma(mean, shape)
    if shape == 0:
        law = stats.logser(1 - gamma)
    elif shape == 1:
        law = stats.geom(gamma)
    else:
        law = None
    if law is not None:
        counts = [drawn.count(k) for k in range(1, 6)]
        expected = [4000 * law.pmf(k) for k in range(1, 6)]
        chi = sum((c - e) ** 2 / e for c, e in zip(counts, expected))
        assert chi < stats.chi2.isf(1e-6, 5)
