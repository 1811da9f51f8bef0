"""What a step holds in memory."""

import torch

from dpsgd.engines import Ghost


def saved_bytes(model, loss, x):
    """Most memory that tensors saved for the backward pass take at a time."""
    total = most = 0

    class Held:
        def __init__(self, tensor):
            nonlocal total, most
            self.tensor = tensor
            self.size = tensor.numel() * tensor.element_size()
            total += self.size
            most = max(most, total)

        def __del__(self):
            nonlocal total
            total -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        Ghost(model, loss)(x)
    return most
