"""What capturing a recurrent network costs: the passes of the ghost engine against PyTorch's own.

Interleaved, medians, nothing private timed: one forward and backward pass for the sum of the losses
(PyTorch), and for inputs and output gradients of all gates, and the norms (ghost). Writes
results.json beside it.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from dpsgd.engines import Ghost

REPETITIONS = 15
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def loss(model: nn.RNNBase, batch: Tensor) -> Tensor:
    """Mean square of the outputs of each sample, [B]."""
    return model(batch)[0].square().mean((1, 2))


def measure(kind: type[nn.RNNBase], batch: Tensor) -> dict[str, float]:
    """Returns median milliseconds of both, and their ratio."""
    model = kind(batch.shape[-1], 128, batch_first=True)
    engine = Ghost(model, loss)

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        loss(model, batch).sum().backward()

    def ghost() -> None:
        engine(batch)

    times: dict[str, list[float]] = {"plain": [], "ghost": []}
    for repetition in range(REPETITIONS + 3):
        for name, run in (("plain", plain), ("ghost", ghost)):
            start = time.perf_counter()
            run()
            if repetition >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": medians["ghost"] / medians["plain"]}


def main() -> None:
    """Measures all kinds and writes the results."""
    batch = torch.randn(256, 32, 64)
    results = {name: measure(kind, batch) for name, kind in KINDS.items()}
    about = {
        "what": "forward and backward pass, batch 256, T 32, input 64, hidden 128, milliseconds",
        "repetitions": REPETITIONS,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
    text = json.dumps({**about, "results": results}, indent=2)
    Path(__file__).with_name("results.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
