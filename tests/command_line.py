"""The real command line in tests: each command in a process of its own."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import dpsgd

ROOT = Path(dpsgd.__file__).parent.parent


@dataclass(frozen=True)
class Done:
    """What a command left behind: its status is minus the signal that killed it, as always.

    The seconds are those of the processor, which do not depend on what else the machine does.
    """

    returncode: int
    stdout: str
    stderr: str
    seconds: float


def environment(**extra):
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        **extra,
    }


@lru_cache(maxsize=1)
def _zygote():
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("zygote.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    atexit.register(process.kill)
    assert process.stdout.readline() == "ready\n"
    return process


def _ask(**request):
    zygote = _zygote()
    zygote.stdin.write(json.dumps(request) + "\n")
    zygote.stdin.flush()
    return json.loads(zygote.stdout.readline())


class Running:
    """A command under way.

    Args:
        arguments: After `python -m MODULE`.
        cwd: Working directory.
        module: What is run.
        before: Python code that runs first, to break something on purpose.
        variables: Of the environment.
    """

    def __init__(self, *arguments, cwd, module="dpsgd.train", before="", variables=None):
        self._files = [  # closed by wait()
            tempfile.NamedTemporaryFile("r", errors="replace")  # noqa: SIM115
            for _ in range(2)
        ]
        _zygote()
        self.pid = _ask(
            arguments=list(arguments), cwd=str(cwd), module=module, before=before,
            environment=variables or {}, stdout=self._files[0].name, stderr=self._files[1].name,
        )["pid"]  # fmt: skip

    def send(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=240):
        answer = _ask(wait=self.pid, timeout=timeout)
        if answer["status"] is None:
            self.send(signal.SIGKILL)
            _ask(wait=self.pid, timeout=10)
        out, err = (file.read() for file in self._files)
        for file in self._files:
            file.close()
        assert answer["status"] is not None, f"no end after {timeout} s: {out}{err}"
        return Done(answer["status"], out, err, answer["seconds"])


def command(*arguments, cwd, check=True, **options):
    """Runs a command to its end."""
    done = Running(*arguments, cwd=cwd, **options).wait()
    if check:
        assert done.returncode == 0, done.stderr + done.stdout
    return done
