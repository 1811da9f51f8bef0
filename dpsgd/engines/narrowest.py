"""In which precision does a forward pass compute?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Narrowest(TorchDispatchMode):
    """Notes the narrowest floating dtype of all results while it is on.

    With parameters in float32 that is bfloat16 under `torch.autocast`, or where a model casts.

    Attributes:
        dtype: The narrowest so far, float64 before anything was computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float64

    @property
    def coarse(self) -> bool:
        """Whether something was computed in less than float32."""
        return torch.finfo(self.dtype).bits < 32

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Called by PyTorch instead of each kernel."""
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.is_floating_point():
                self.dtype = min(self.dtype, x.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        return result
