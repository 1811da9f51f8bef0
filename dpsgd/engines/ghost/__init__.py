"""The ghost engine: captures functions, not modules, in one forward and one backward pass."""

from dpsgd.engines.ghost.engine import Ghost
from dpsgd.engines.ghost.taped import TapedGrads

__all__ = ["Ghost", "TapedGrads"]
