"""Runs commands in children of one process that has imported everything once.

`python -m dpsgd.train` takes seconds to import PyTorch; a test suite has hundreds of commands. A
child is a fork: it has its own memory, working directory, standard streams and exit status, and
can be killed, just like the command started from a shell.

Requests and answers are lines of JSON on the standard streams.
"""

import gc
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback

MODULES = (
    "dpsgd.train", "dpsgd.account", "dpsgd.audit", "dpsgd.bench", "dp_accounting",
    "sklearn.datasets", "torch.utils.tensorboard", "safetensors.torch", "scipy.stats",
    "matplotlib.backends.backend_agg", "opacus", "jinja2", "torch._dynamo",
    "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.tensor",
    "transformers.models.gpt2.modeling_gpt2", "peft", "datasets",
)  # fmt: skip


def child(request):
    os.chdir(request["cwd"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(request["environment"])
    sys.path.insert(0, request["cwd"])
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    sys.argv = [request["module"], *request["arguments"]]
    status = 1
    try:
        exec(request["before"], {})
        importlib.import_module(request["module"]).main()
        status = 0
    except SystemExit as end:
        status = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = status or 120
    for process in multiprocessing.active_children():  # idle ones of a sweep in parallel
        os.kill(process.pid, signal.SIGKILL)
    os._exit(status)


def waited(pid, timeout):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            seconds = usage.ru_utime + usage.ru_stime
            return {"status": os.waitstatus_to_exitcode(status), "seconds": seconds}
        time.sleep(0.002)
    return {"status": None}


def serve():
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # what is imported is nobody's garbage: no child goes through it
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = waited(request["wait"], request["timeout"])
        else:
            pid = os.fork()
            if not pid:
                child(request)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
