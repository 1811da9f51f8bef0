"""Models whose parameters FSDP2 has sharded: what an engine has to know about them."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import Tensor, nn

from dpsgd.engines.graph import leaves


def is_sharded(parameters: Mapping[str, Tensor]) -> bool:
    """Whether some parameter is a distributed tensor, of which this process holds a part."""
    loaded = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return loaded is not None and any(isinstance(p, loaded.DTensor) for p in parameters.values())


def reshard(model: nn.Module) -> None:
    """Brings a model that FSDP2 manages back into its sharded form; any other stays as it is.

    A forward pass without a backward pass, an evaluation for example, leaves the outermost module
    whole, and its parameters are other objects then.
    """
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is not None and isinstance(model, loaded.FSDPModule):
        for module in model.modules():
            if isinstance(module, loaded.FSDPModule):
                module.reshard()


class Names:
    """Names of the trainable parameters, by the objects that a loss meets.

    A sharded parameter is another object while its module runs: the whole one. Such objects are
    looked up in the model at the very call that takes them.

    Args:
        model: The model.
        parameters: Its trainable parameters by name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self.sharded = is_sharded(parameters)
        self._model = model
        self._parameters = parameters
        self._known = {id(p): (name, p) for name, p in parameters.items()}  # held: ids stay theirs

    def get(self, x: Tensor) -> str | None:
        """Returns the name of a parameter, None for any other tensor."""
        found = self._known.get(id(x))
        return None if found is None else found[0]

    def note(self, weight: Tensor) -> None:
        """Learns the parameters that a weight is made of, while they are what they are now."""
        if self.sharded and any(id(leaf) not in self._known for leaf in leaves(weight)):
            for name, p in self._model.named_parameters():
                if name in self._parameters:
                    self._known[id(p)] = name, p
