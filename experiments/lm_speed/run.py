"""Tokens per second of private fine-tuning of GPT-2, in full and with LoRA, beside ordinary.

    python experiments/lm_speed/run.py                 # GPT-2 small on a GPU, a tiny one elsewhere
    python experiments/lm_speed/run.py --size small    # GPT-2 small, wherever

Writes results-DEVICE.json. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dpsgd import PrivateStep
from dpsgd.clipping import Flat
from dpsgd.engines import Ghost
from dpsgd.losses import causal_lm
from dpsgd.models import huggingface
from dpsgd.noise import Gaussian
from dpsgd.precision import Autocast

HERE = Path(__file__).parent
SIZES = {  # fields of GPT-2's configuration, vocabulary, tokens per sample, samples
    "tiny": ({"n_layer": 4, "n_embd": 128, "n_head": 4}, 1000, 128, 8),
    "small": ({"n_layer": 12, "n_embd": 768, "n_head": 12}, 50257, 1024, 16),
}
LORA = {"r": 16, "alpha": 32, "target_modules": ["c_attn", "c_proj", "c_fc"]}
REPETITIONS = 9


def steps_of(
    size: str, lora: dict[str, Any] | None, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A private and an ordinary step of models alike, on the same batch, under autocast."""
    fields, vocabulary, length, samples = SIZES[size]
    ids = torch.randint(vocabulary, (samples, length), device=device)
    batch, loss_fn = (ids, ids), Autocast(causal_lm)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = {**fields, "n_positions": length, "resid_pdrop": 0, "embd_pdrop": 0}
        config |= {"attn_pdrop": 0}
        made = huggingface(
            "causal_lm", [length], vocabulary, vocabulary, type="gpt2", config=config, lora=lora
        )
        models.append(made.to(device).train())
    engine = Ghost(models[0], loss_fn)
    step = PrivateStep(
        engine,
        torch.optim.AdamW(engine.parameters.values(), lr=1e-5),
        clipping=Flat(1.0),
        noise=Gaussian(),
        noise_multiplier=1.0,
        expected_batch_size=samples,
    )
    parameters = [p for p in models[1].parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def ordinary() -> None:
        loss_fn(models[1], batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda: step(batch), ordinary


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """How long a call takes until the device has done it."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    """Measures both kinds of fine-tuning, steps taking turns."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small" if cuda else "tiny")
    size = parser.parse_args().size
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else "cpu"
    tokens = SIZES[size][2] * SIZES[size][3]
    rows = []
    for kind, lora in (("all weights", None), ("LoRA, rank 16", LORA)):
        systems = dict(zip(("private", "ordinary"), steps_of(size, lora, device), strict=True))
        times: dict[str, list[float]] = {system: [] for system in systems}
        for number in track(range(REPETITIONS + 2), description=kind):
            for system, function in systems.items():
                taken = seconds(function, device)
                if number >= 2:
                    times[system].append(taken)
        medians = {system: statistics.median(values) for system, values in times.items()}
        rows.append(
            {
                "kind": kind,
                "seconds": medians,
                "ratio": medians["private"] / medians["ordinary"],
                "tokens_per_second": {s: tokens / value for s, value in medians.items()},
            }
        )
    facts = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    result = {**facts, "size": size, "tokens_per_step": tokens, "rows": rows}
    (HERE / f"results-{device.type}.json").write_text(json.dumps(result, indent=1) + "\n")
    table = Table("", "private tokens/s", "ordinary tokens/s", "time, private : ordinary")
    for row in rows:
        speeds = (f"{row['tokens_per_second'][s]:,.0f}" for s in ("private", "ordinary"))
        table.add_row(row["kind"], *speeds, f"{row['ratio']:.2f}")
    Console().print(f"GPT-2 ({size}) in bfloat16 autocast on {name}", table)


if __name__ == "__main__":
    main()
