"""Engines: every way of getting per-sample gradients, behind one interface."""

from dpsgd.engines.base import Engine, LossFn
from dpsgd.engines.batch import Batch
from dpsgd.engines.dense import DenseGrads
from dpsgd.engines.ghost import Ghost, TapedGrads
from dpsgd.engines.grads import Groups, PerSampleGrads
from dpsgd.engines.hooks import Hooks
from dpsgd.engines.loop import Loop
from dpsgd.engines.opacus import Opacus
from dpsgd.engines.vmap import Vmap

__all__ = [
    "Batch",
    "DenseGrads",
    "Engine",
    "Ghost",
    "Groups",
    "Hooks",
    "Loop",
    "LossFn",
    "Opacus",
    "PerSampleGrads",
    "TapedGrads",
    "Vmap",
]
