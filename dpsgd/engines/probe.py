"""A check for engines that read the sample axis off the first dimension of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dpsgd.engines.batch import Batch, Signature, map_tensors, signature_of


class RandomState:
    """The state of PyTorch's generators (CPU and the model's CUDA devices), to draw again from."""

    def __init__(self, model: nn.Module) -> None:
        self._devices = sorted(
            {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
        )
        self._cpu = torch.random.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]

    def restore(self) -> None:
        """Goes back to this state."""
        torch.random.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Goes back to this state for a while, and then to the present one."""
        with torch.random.fork_rng(devices=self._devices):
            self.restore()
            yield


class SizeProbe:
    """Runs a model once per batch signature at *another* batch size.

    A dimension belongs to the samples if and only if it changes with the batch size. Without the
    probe, a layer fed with [T] position ids or time-major data [T, B, ...] would be mistaken for a
    batch whenever T = B. Only shapes decide, so a refusal says nothing about the records.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[bool, Signature]] = set()

    def __call__(
        self, model: nn.Module, batch: Batch, size: int, run: Callable[[Batch, int], object]
    ) -> None:
        """Calls `run(other_batch, other_size)`, which raises if some layer sees another size.

        Random states and buffers are restored afterwards.
        """
        signature = (model.training, signature_of(batch))
        if signature in self._seen:
            return
        other = size + 1
        larger = map_tensors(lambda t: torch.cat([t, t[:1]]), batch)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        with RandomState(model).replayed(), torch.enable_grad():
            try:
                run(larger, other)
            except ValueError:
                raise
            except Exception as error:
                raise ValueError(
                    f"The model runs on {size} samples but not on {other}: {error} "
                    "Expected a model without a fixed batch size."
                ) from error
            finally:
                for buffer, kept in buffers:
                    buffer.copy_(kept)
        self._seen.add(signature)
