"""What the package must not do: run code from files, or hand out keys."""

import ast
from pathlib import Path

import pytest
from command_line import command

import dpsgd

PACKAGE = Path(dpsgd.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def name_of(node):
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([*([node.id] if isinstance(node, ast.Name) else []), *reversed(parts)])


def offences(text):
    """What a source does that it must not, by line."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module or ""]
        else:
            found = []
        for name in found:
            if name.split(".")[0] in FORBIDDEN_MODULES:
                yield node.lineno, f"import {name}"
        if not isinstance(node, ast.Call):
            continue
        called = name_of(node.func)
        options = {k.arg: k.value for k in node.keywords}
        if called in FORBIDDEN_CALLS:
            yield node.lineno, called
        if called in ("torch.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load"):
            yield node.lineno, called
        if called == "np.load" and not _is(options.get("allow_pickle"), False):
            yield node.lineno, "np.load without allow_pickle=False"
        if "trust_remote_code" in options and not _is(options["trust_remote_code"], False):
            yield node.lineno, "trust_remote_code"
        if "shell" in options or called == "os.system":
            yield node.lineno, "a shell"


def _is(node, value):
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_can_run_code(path):
    assert list(offences(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from dill import loads", "eval('1')", "torch.load('x')",
        "np.load('x')", "np.load('x', allow_pickle=True)", "f(trust_remote_code=True)",
        "subprocess.run('x', shell=True)", "os.system('x')", "yaml.load('x')",
    ],
)  # fmt: skip
def test_the_scan_sees_what_it_looks_for(text):
    assert list(offences(text))


def test_the_package_is_all_there():
    assert len(SOURCES) > 100


@pytest.mark.parametrize("debug", ["false", "true"])
@pytest.mark.parametrize("error", ["RuntimeError('odd')", "KeyError('odd')", "ValueError('odd')"])
def test_a_crash_does_not_print_the_key(error, debug, tmp_path):
    """Hydra prints the overrides when an error passes through it."""
    key = "cd" * 32
    before = f"from dpsgd import train\ndef crash(*_): raise {error}\ntrain.prepare = crash"
    done = command(f"privacy.key={key}", f"debug={debug}", cwd=tmp_path, before=before, check=False)
    assert done.returncode
    assert "odd" in done.stderr
    assert key not in done.stderr + done.stdout
