"""One step of DP-SGD, for every engine, clipping policy and optimizer."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd.clipping import Clipping
from dpsgd.engines import Batch, Engine
from dpsgd.engines.batch import size_of
from dpsgd.noise import Gaussian
from dpsgd.parallel import Parallel
from dpsgd.schedules import CONSTANT, Schedule
from dpsgd.step_checks import alone, check_no_batch_statistics, check_optimizer, mask_column
from dpsgd.step_state import alike, kind_of, load_optimizer, tensors_of

_STATISTIC = "(clipping statistic)"


@dataclass(frozen=True)
class Contribution:
    """What one physical batch brought into the sum. All of it is sensitive: never publish it.

    Attributes:
        losses: Per-sample losses [B].
        norms: Norms before clipping [B, K].
        weights: Clip weights times the mask [B, K].
    """

    losses: Tensor
    norms: Tensor
    weights: Tensor


class PrivateStep:
    """Differentially private SGD (Abadi et al. 2016, arXiv:1607.00133) as an object.

    For each physical batch `accumulate(batch, mask)`, then once `release()`: noise is added to the
    sum of the clipped gradients, the sum is divided by the public expected batch size and handed to
    the optimizer. A call with one batch does both.

    Guarantee: with add/remove adjacency, each release is a Gaussian mechanism of noise multiplier
    `noise_multiplier` on a vector of L2 sensitivity <= `clipping.sensitivity`: the sum and, with a
    policy that learns its clip norm, the statistic that it learns from. The privacy of many
    releases follows from how the batches are drawn (`dpsgd.sampling`, `dpsgd.accounting`;
    `dpsgd.plan.PrivacyPlan` holds both together). Zero noise gives none.

    Args:
        engine: Any engine; its model's trainable parameters are trained.
        optimizer: Any `torch.optim` optimizer over exactly these parameters.
        clipping: A clipping policy, `dpsgd.clipping.Flat(max_grad_norm=C)` for example.
        noise: `dpsgd.noise.Gaussian()`.
        noise_multiplier: noise_std / max_grad_norm, >= 0.
        expected_batch_size: The public divisor, sample_rate times the public size of the data,
            never the size of the drawn batch.
        noise_schedule: Factors of the noise multiplier by step.
        batch_schedule: Factors of the expected batch size by step, those of the sample rate.
        num_steps: The budget: no more releases than these. None sets no limit.
        parallel: How several processes take the step together, `dpsgd.parallel.ddp()` for example:
            each accumulates its own share of the batch, and all release. One process by default.

    Attributes:
        step: Number of releases so far.
        clipping: The policy of the next release; one that learns moves with each.

    Raises:
        ValueError: If a number is out of range, optimizer and model disagree, or the processes do.
    """

    def __init__(
        self,
        engine: Engine,
        optimizer: torch.optim.Optimizer,
        *,
        clipping: Clipping,
        noise: Gaussian,
        noise_multiplier: float,
        expected_batch_size: float,
        noise_schedule: Schedule = CONSTANT,
        batch_schedule: Schedule = CONSTANT,
        num_steps: int | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        parallel = alone() if parallel is None else parallel
        for part, kind in (
            (engine, Engine),
            (clipping, Clipping),
            (noise, Gaussian),
            (parallel, Parallel),
        ):
            if not isinstance(part, kind):
                raise ValueError(f"Expected a {kind.__name__}, got {type(part).__name__}.")
        if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
            raise ValueError(f"Expected a finite noise_multiplier >= 0, got {noise_multiplier}.")
        if not (math.isfinite(expected_batch_size) and expected_batch_size > 0):
            raise ValueError(
                f"Expected a finite expected_batch_size > 0, got {expected_batch_size}."
            )
        check_optimizer(optimizer, engine)
        parallel.claim()
        parallel.check(engine)
        self.engine = engine
        self.optimizer = optimizer
        self.clipping = clipping
        self.noise = noise
        self.noise_multiplier = noise_multiplier
        self.expected_batch_size = expected_batch_size
        self.noise_schedule = noise_schedule
        self.batch_schedule = batch_schedule
        self.num_steps = num_steps
        self.parallel = parallel
        self.step = 0
        self._passes = 0
        self._owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._statistic: Tensor | None = None
        parallel.world.agree(self._figures(), "figures of the private step")

    def __call__(self, batch: Batch) -> Contribution:
        """Accumulates one batch and releases: a whole step.

        Raises:
            ValueError: If sums of an unfinished step are pending.
        """
        if self.parallel.pending:
            raise ValueError(
                "A step is under way. Expected release() or discard() before a new whole step."
            )
        contribution = self.accumulate(batch)
        self.release()
        return contribution

    def accumulate(self, batch: Batch, mask: Tensor | None = None) -> Contribution:
        """Adds the clipped gradients of one physical batch to the sum of this step.

        Args:
            batch: A pytree of tensors [B, ...].
            mask: Which rows are samples, [B] of 0 and 1 or bool; the others are padding and count
                nothing, whatever they hold. All by default.

        Returns:
            Losses, norms and weights, all of them sensitive.

        Raises:
            ValueError: As the engine does. The sums of the step so far are discarded, so that a
                repeated step cannot count a sample twice.
        """
        self._check_budget()
        try:
            if not self.parallel.pending:  # the last gradients need not outlive the forward pass
                self.optimizer.zero_grad(set_to_none=True)
            check_no_batch_statistics(self.engine.model)
            parameters = self.engine.parameters
            if self.parallel.even:
                self._check_pass(batch)
            grads = self.engine(batch)
            clipping = self.clipping.at(self.step)
            groups = clipping.groups(list(parameters))
            norms = grads.norms(groups)
            counted = mask_column(mask, norms)
            weights = clipping(norms) * counted
            statistic = clipping.statistic(norms, counted[:, 0])
            if statistic is not None:
                self._statistic = statistic + (0 if self._statistic is None else self._statistic)
            self.parallel.add(grads, weights, groups, parameters)
            return Contribution(grads.losses, norms, weights)
        except BaseException:
            self.discard()
            raise

    def release(self) -> None:
        """Adds the noise, sets the gradients and steps the optimizer.

        Without a sample (an empty Poisson draw) it releases noise alone, as it must.
        """
        self._check_budget()
        parameters = self.engine.parameters
        statistic = self._statistic
        self._statistic, self._passes = None, 0
        self._check_together(parameters)
        if not self.parallel.pending:
            self.optimizer.zero_grad(set_to_none=True)
        sums, offsets = self.parallel.total(parameters)
        step, clipping = self.step, self.clipping.at(self.step)
        statistic = self._statistic_of_all(clipping, statistic, parameters)
        self.step += 1
        released = sums if statistic is None else {**sums, _STATISTIC: statistic}
        offsets[_STATISTIC] = sum(p.numel() for p in parameters.values())
        noise_multiplier = self.noise_multiplier * self.noise_schedule(step)
        self.noise.add_(released, noise_multiplier * clipping.sensitivity, step, offsets)
        divisor = self.expected_batch_size * self.batch_schedule(step)
        if statistic is not None:
            self.clipping = clipping.learned(statistic, divisor)
        self.optimizer.zero_grad(set_to_none=True)  # no gradient but the private ones is stepped
        for name, p in parameters.items():
            p.grad = self.parallel.gradient(p, sums[name].div_(divisor))
        self.optimizer.step()

    def _check_pass(self, batch: Batch) -> None:
        """Raises unless all processes begin the same physical batch, and have rows."""
        rows = size_of(batch)
        place = {"which call it is": 1, "step": self.step, "physical batch": self._passes}
        self.parallel.world.lockstep({**place, "whether there are rows": int(rows > 0)})
        self._passes += 1
        if not rows:
            raise ValueError(
                "Expected rows in every physical batch of a sharded model, got none. Where there "
                "is nothing, give one row of anything with mask 0."
            )

    def _check_together(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raises unless all processes release the same step of the same parameters.

        Nothing is left of the sums then, and no noise has been spent.
        """
        try:
            if not {id(p) for p in parameters.values()} <= self._owned:
                raise ValueError(
                    "Expected the parameters that the optimizer has, but the model has others by "
                    "now (sharded or replaced since). Make optimizer and step after that."
                )
            if self.parallel.world.size > 1:
                words = f"{list(parameters)} {self.clipping}".encode()
                digest = int.from_bytes(hashlib.sha256(words).digest()[:7], "big")
                place = {"which call it is": 2, "step": self.step}
                self.parallel.world.lockstep({**place, "trainable parameters or clipping": digest})
        except ValueError:
            self.discard()
            raise

    def _statistic_of_all(
        self, clipping: Clipping, own: Tensor | None, parameters: Mapping[str, nn.Parameter]
    ) -> Tensor | None:
        """The statistic over all processes: of no sample where there was none; None without one."""
        p = next(iter(parameters.values()))
        dtype = torch.promote_types(p.dtype, torch.float32)  # the same on all processes
        if own is None:
            none = torch.zeros(0, 1, dtype=dtype, device=p.device)
            own = clipping.statistic(none, none[:, 0])
        if own is not None:
            own = own.to(dtype)
            self.parallel.world.sum_(own)
        return own

    def _figures(self) -> dict[str, Any]:
        """What all processes must have in common, the noise above all."""
        return {
            "key of the noise": self.noise.name,
            "clipping": self.clipping,
            "noise_multiplier": self.noise_multiplier,
            "noise_schedule": self.noise_schedule,
            "expected_batch_size": self.expected_batch_size,
            "batch_schedule": self.batch_schedule,
            "num_steps": self.num_steps,
            "step": self.step,
            "optimizer": self.optimizer,
            "trainable parameters": {n: list(p.shape) for n, p in self.engine.parameters.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next step depends on, besides the keys of noise and sampling.

        Public, being made from releases alone: steps, clip norm, parameters, buffers, optimizer.
        """
        return {
            "step": self.step,
            "max_grad_norm": self.clipping.max_grad_norm,
            "model": {n: t.detach().clone() for n, t in tensors_of(self.engine.model).items()},
            "optimizer_kind": kind_of(self.optimizer),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, own_figures: bool = False) -> None:
        """Goes on from what `state_dict` returned.

        Args:
            state: What it returned.
            own_figures: Whether the optimizer keeps its own figures, its learning rate for example;
                one of another kind then begins without a state.

        Raises:
            ValueError: If it is not the state of such a model and optimizer, or a step is under
                way. Nothing is changed then.
        """
        if self.parallel.pending:
            raise ValueError("A step is under way. Expected release() or discard() before loading.")
        step = int(state["step"])
        clipping = replace(self.clipping, max_grad_norm=state["max_grad_norm"])
        own, found = tensors_of(self.engine.model), state["model"]
        wrong = sorted(own.keys() ^ found.keys())
        wrong += [n for n in own.keys() & found.keys() if not alike(own[n], found[n])]
        if wrong:
            raise ValueError(f"Expected the state of this model, got another one of {wrong}.")
        if state["optimizer_kind"] == kind_of(self.optimizer):
            load_optimizer(self.optimizer, state["optimizer"], own_figures)
        elif not own_figures:
            kinds = f"{kind_of(self.optimizer)}, got {state['optimizer_kind']}"
            raise ValueError(f"Expected the state of an optimizer {kinds}.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(found[name])
        self.step, self.clipping = step, clipping

    def _check_budget(self) -> None:
        if self.num_steps is not None and self.step >= self.num_steps:
            raise ValueError(
                f"Expected at most {self.num_steps} steps, the budget of the plan, which is spent. "
                "Stop here, or start anew with a plan of more steps."
            )

    def discard(self) -> None:
        """Forgets what has been accumulated since the last release. No noise is spent."""
        self.parallel.discard()
        self._statistic, self._passes = None, 0
