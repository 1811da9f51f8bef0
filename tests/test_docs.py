"""Every Python example of the documentation runs; every command of it composes."""

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
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

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


def blocks(kind):
    for page in PAGES:
        for i, block in enumerate(re.findall(rf"```{kind}\n(.*?)```", page.read_text(), re.S)):
            yield pytest.param(block, id=f"{page.name}-{i}")


def commands():
    for param in blocks("console"):
        for line in param.values[0].splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["python", "-m"] and "--config-dir" not in words:
                yield pytest.param(words[2], words[3:], id=" ".join(words[2:])[:70])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs")
    command("trainer.num_steps=2", "run.dir=runs/x", cwd=path)
    small = ("data.public_size=500", "data.num_test=20")
    command("experiment=lm_lora", "trainer.num_steps=1", *small, "run.dir=runs/lm", cwd=path)
    return path


@pytest.mark.parametrize("code", blocks("python"))
def test_the_example_runs(code, folder):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


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
    page = (ROOT / "docs" / "engines.md").read_text()
    own = [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "rules.reg" in code]
    assert len(own) == 2
    assert all(len(code.split("\n\n\n", 1)[1].splitlines()) <= 20 for code in own)
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
