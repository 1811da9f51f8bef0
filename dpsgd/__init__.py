"""Differentially private training in PyTorch, with every per-sample gradient engine."""

from dpsgd.private_step import PrivateStep
from dpsgd.saved_run import Run, load_run
from dpsgd.seeding import seed_everything

__version__ = "0.1.0"

__all__ = ["PrivateStep", "Run", "__version__", "load_run", "seed_everything"]
