"""Every Python example of the documentation runs; every command of it composes; the site builds."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import command, environment
from hydra import compose, initialize_config_dir

from dpsgd.config import config_dir, resolve

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUICKSTART = ROOT / "docs" / "quickstart.md"
EXTENDING = ROOT / "docs" / "extending"
LOADED = re.compile(r"<(?:script|img|iframe|link)[^>]*?(?:src|href)=\"?([^\s\">]+)")

LIBRARIES = [
    "opacus",
    "hydra",
    "omegaconf",
    "dp_accounting",
    "sklearn",
    "cryptography",
    "safetensors",
    "rich",
    "matplotlib",
    "tensorboard",
    "datasets",
    "scipy",
]


def of_kind(kind, page):
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.S | re.M)


def blocks(kind):
    for page in PAGES:
        for i, block in enumerate(of_kind(kind, page)):
            yield pytest.param(block, id=f"{page.relative_to(ROOT)}-{i}")


def examples():
    """The Python blocks, each on its own; those of a page on extending go on from one another."""
    for page in PAGES:
        found = of_kind("python", page)
        if page.parent == EXTENDING:
            found = ["\n\n".join(found)]
        for i, block in enumerate(found):
            yield pytest.param(block, id=f"{page.relative_to(ROOT)}-{i}")


def dpsgd_commands(block):
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        if words[1:2] == ["-m"] and words[0].endswith("python"):
            yield words[2], words[3:]


def commands():
    for param in blocks("console"):
        for module, words in dpsgd_commands(param.values[0]):
            if "--config-dir" not in words:
                yield pytest.param(module, words, id=" ".join([module, *words])[:70])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs")
    command("trainer.num_steps=2", "run.dir=runs/x", cwd=path)
    small = ("data.public_size=500", "data.num_test=20")
    command("experiment=lm_lora", "trainer.num_steps=1", *small, "run.dir=runs/lm", cwd=path)
    run(of_kind("python", QUICKSTART)[0], path)
    train = "".join(of_kind("console", QUICKSTART)).partition("dpsgd.train ")[2].split("\n")[0]
    quick = train.replace("trainer.epochs=5", "trainer.num_steps=2 privacy.noise_multiplier=1")
    command(*quick.split(), cwd=path)
    return path


def run(code, folder):
    """Runs Python in a process of its own that has imported everything, and nothing after it."""
    command(cwd=folder, before=f"{code}\nraise SystemExit")


@pytest.mark.parametrize("code", examples())
def test_the_example_runs(code, folder):
    run(code, folder)


@pytest.mark.parametrize(("module", "arguments"), commands())
def test_the_command_composes(module, arguments):
    overrides = [word.split(",")[0] if "-m" in arguments else word for word in arguments]
    overrides = [word for word in overrides if word != "-m"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        name = module.rpartition(".")[2]
        resolve(compose(name, overrides=overrides), overrides)


def test_a_rule_of_ones_own_is_right(monkeypatch):
    from cases import squares

    from dpsgd import engines
    from dpsgd.rules import layers, registry

    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(layers, "_LAYERS", dict(layers._LAYERS))
    own = [code for code in of_kind("python", EXTENDING / "rule.md") if "rules.reg" in code]
    assert len(own) == 2
    assert all(len(code.split("\n\n\n", 1)[-1].splitlines()) <= 20 for code in own)
    namespace = {}
    for code in own:
        exec(code, namespace)
    model = torch.nn.Sequential(namespace["Centres"](4, 3), torch.nn.Linear(3, 2)).double()
    x = torch.randn(3, 5, 4).double()
    expected = engines.Loop(model, squares)(x).materialize()
    for engine in (engines.Ghost, engines.Hooks):
        grads = engine(model, squares)(x)
        torch.testing.assert_close(grads.materialize(), expected)
        torch.testing.assert_close(grads.norms(), engines.Loop(model, squares)(x).norms())
    assert engines.Ghost(model, squares)(x).routes()["0.centres"] == "distance"


@pytest.mark.slow
def test_the_quickstart_works_and_says_what_comes_out(tmp_path):
    page, output = QUICKSTART.read_text(), []
    for kind, block in re.findall(r"^```(console|python)\n(.*?)^```", page, re.S | re.M):
        if kind == "python":
            run(block, tmp_path)
            continue
        for module, words in dpsgd_commands(block):
            output.append(command(*words, module=module, cwd=tmp_path).stdout)
    assert "epsilon 2.9982" in page
    assert "epsilon 2.9982" in output[0]
    assert "98 of 98" in output[1]
    accuracy = float(re.search(r"accuracy +│ ([\d.]+)%", output[1])[1])
    assert accuracy == pytest.approx(float(re.search(r"accuracy +│ ([\d.]+)%", page)[1]), abs=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "group", "name"),
    [("engine", "engine", "rows"), ("clipping-policy", "clipping", "smooth")],
)
def test_what_the_pages_on_extending_make_passes_the_audit(page, group, name, tmp_path):
    text = EXTENDING / f"{page}.md"
    (code,) = of_kind("python", text)
    (config,) = of_kind("yaml", text)
    audit = next(line for line in "".join(of_kind("console", text)).splitlines() if "audit" in line)
    (tmp_path / "mypackage.py").write_text(code)
    (tmp_path / "conf" / group).mkdir(parents=True)
    (tmp_path / "conf" / group / f"{name}.yaml").write_text(config)
    words = [re.sub("audit.runs=.*", "audit.runs=100", word) for word in shlex.split(audit)[3:]]
    done = command(*words, module="dpsgd.audit", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


class Messages(ast.NodeVisitor):
    """All strings of a module but its docstrings; `…` for what is filled in."""

    def __init__(self):
        self.found = set()

    def visit_Expr(self, node):
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_JoinedStr(self, node):
        parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
        self.found.add("".join(parts))

    def visit_Constant(self, node):
        if isinstance(node.value, str):
            self.found.add(node.value)


def test_troubleshooting_quotes_messages_that_exist():
    messages = Messages()
    for path in (ROOT / "dpsgd").rglob("*.py"):
        messages.visit(ast.parse(path.read_text()))
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^### `(.*)`$", page, re.M)
    assert len(quoted) >= 30
    assert len(quoted) == len(re.findall(r"^### ", page, re.M)) == len(set(quoted))
    gone = [q for q in quoted if not any(m.startswith(q.removesuffix("…")) for m in messages.found)]
    assert gone == []


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_fetches_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=environment(NO_MKDOCS_2_WARNING="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1  # README is the index
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|iframe|link)[^>]*?(?:src|href)=\"?([^\s\">]+)", page.read_text()
        )
        assert [address for address in loaded if "//" in address] == [], page


def test_the_reference_has_no_code_of_its_own():
    for page in (ROOT / "docs" / "api").glob("*.md"):
        assert "```" not in page.read_text()


def test_engines_clipping_and_noise_need_nothing_but_torch(tmp_path):
    """Research code and bare GPU machines use them alone."""
    code = (
        "import sys\n"
        f"for name in {LIBRARIES!r}: sys.modules[name] = None\n"
        "import torch, dpsgd\n"
        "from dpsgd.engines import Ghost, Hooks, Loop, Vmap\n"
        "from dpsgd import clipping, noise, rules, losses\n"
        "model = torch.nn.Linear(3, 2)\n"
        "for engine in (Ghost, Loop, Hooks, Vmap):\n"
        "    g = engine(model, losses.cross_entropy)((torch.randn(4, 3), torch.zeros(4).long()))\n"
        "    g.weighted_sum(clipping.Flat(1.0)(g.norms()))\n"
        "try:\n    dpsgd.engines.Opacus(model, losses.cross_entropy)\n"
        "except ValueError as error:\n    assert 'pip install opacus' in str(error)\n"
        "else:\n    raise SystemExit('Opacus was imported')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
