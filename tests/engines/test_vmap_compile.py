"""`engine=vmap engine.compile=true` where there is no compiler: one line, and on without."""

import os
import subprocess
import sys

PROGRAM = """
import torch, warnings
from torch import nn
from dpsgd import engines

model = nn.Linear(3, 2).double()
x = torch.randn(4, 3).double()
loss = lambda m, b: m(b).square().sum(1)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    engine = engines.Vmap(model, loss, compile=True)
    norms = engine(x).norms()
    engine(x)
told = [str(w.message) for w in said if "C++ compiler" in str(w.message)]
assert len(told) == 1 and "going on without" in told[0], told
assert torch.allclose(norms, engines.Loop(model, loss)(x).norms())
"""


def test_vmap_goes_on_uncompiled_where_no_compiler_works(tmp_path):
    environment = {
        **os.environ,
        "CXX": "/nonexistent/compiler",
        "PATH": os.path.dirname(sys.executable),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
