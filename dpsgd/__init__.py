"""Differentially private training in PyTorch, with every per-sample gradient engine."""

from dpsgd.private_step import PrivateStep

__version__ = "0.1.0"

__all__ = ["PrivateStep", "__version__"]
