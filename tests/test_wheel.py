"""The wheel: builds, installs alone, trains outside the checkout, brings nothing but dpsgd."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILDS = ["dpsgd", "configs", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A fresh environment with the wheel in it, and today's libraries visible behind it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in BUILDS:
        item = ROOT / name
        copy = shutil.copytree if item.is_dir() else shutil.copy
        copy(item, source / name)
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=source)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env/bin/python"
    packages = Path(
        run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    before = set(packages.iterdir())
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet",
        "--target", str(packages), str(wheel))  # fmt: skip
    landed = {path.name for path in set(packages.iterdir()) - before}
    # the libraries of this environment, found after the wheel's own folder
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, packages, landed


def test_nothing_but_dpsgd_lands_in_site_packages(installed):
    _, _, landed = installed
    assert {name.split("-")[0] for name in landed} == {"dpsgd"}


def test_the_wheel_has_configs_and_type_marker(installed):
    _, packages, _ = installed
    assert (packages / "dpsgd/configs/train.yaml").is_file()
    assert (packages / "dpsgd/configs/engine/vmap.yaml").is_file()
    assert (packages / "dpsgd/py.typed").is_file()


def test_three_steps_outside_the_checkout(installed, tmp_path):
    python, packages, _ = installed
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = run(
        str(python), "-c", "import dpsgd; print(dpsgd.__file__)", cwd=tmp_path, env=environment
    )
    assert Path(out.strip()).is_relative_to(packages)
    out = run(
        str(python), "-m", "dpsgd.train", "trainer.num_steps=3", "run.dir=r", "device=cpu",
        cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert "3 of 3" in out
    assert (tmp_path / "r/model.safetensors").is_file()


def test_the_version_stands_in_one_place():
    import dpsgd

    assert f'__version__ = "{dpsgd.__version__}"' in (ROOT / "dpsgd/__init__.py").read_text()
    assert dpsgd.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert f'"{dpsgd.__version__}"' not in (ROOT / "pyproject.toml").read_text()
