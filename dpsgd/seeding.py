"""Repeatable runs: one seed for every generator that is not private."""

from __future__ import annotations

import hashlib
import os
import random
from typing import Any

import torch


def seed_everything(seed: int, env: Any = None) -> None:
    """Seeds Python, NumPy, PyTorch (CPU and CUDA) and makes cuDNN deterministic.

    The seed governs what is public: initial weights, dropout, synthetic data. Noise and sampling
    take their key from the operating system instead (`dpsgd.rng`).

    Args:
        seed: In [0, 2^32).
        env: An environment to seed as well: gymnasium's `reset(seed=)` or the older
            `env.seed(seed)`.

    Raises:
        ValueError: If the seed is out of range or the environment takes none.
    """
    import numpy as np

    if not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise ValueError(f"Expected an integer seed in [0, 2^32), got {seed!r}.")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)  # for the processes that this one starts
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if env is not None:
        _seed_environment(env, seed)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seeds Python, NumPy and PyTorch for one step of a run: dropout, and whatever else is random.

    So a step's random numbers are a function of (seed, step), not of how often the steps before it
    drew some, which the sizes of private batches decide.

    Args:
        seed: The run's.
        step: Number of the step.
        rank: Number of the process: each has random numbers of its own.
    """
    import numpy as np

    process = f" in process {rank}" if rank else ""
    words = hashlib.sha256(f"step {step} of seed {seed}{process}".encode()).digest()
    number = int.from_bytes(words[:4], "big")
    random.seed(words)
    np.random.seed(number)
    number = int.from_bytes(words[4:12], "big")
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # torch.manual_seed would take longer than a small step
        torch.cuda.manual_seed_all(number)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


def _seed_environment(env: Any, seed: int) -> None:
    older = getattr(env, "seed", None)
    if callable(older):
        older(seed)
        return
    try:
        env.reset(seed=seed)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"Expected an environment with reset(seed=...) or seed(...), got {type(env).__name__}."
        ) from error
