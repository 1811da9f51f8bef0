"""The training loop: sample, accumulate, privatise, step; a report after each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dpsgd import rng
from dpsgd.averaging import averaged, forget_average, update_average
from dpsgd.checks import restored, synthetic_units
from dpsgd.data import Dataset, Users
from dpsgd.diagnostics import diagnostics, sums_of
from dpsgd.engines import Batch
from dpsgd.engines.batch import map_tensors
from dpsgd.engines.memory import is_out_of_memory
from dpsgd.evaluate import MOST_ROWS, evaluate
from dpsgd.ledger import Ledger
from dpsgd.placement import Placement
from dpsgd.plan import PrivacyPlan
from dpsgd.private_step import Contribution, PrivateStep
from dpsgd.recipe import PLAIN, Recipe
from dpsgd.sampling import UserPoisson
from dpsgd.seeding import seed_step
from dpsgd.trainer_checks import check_loss, check_plan, check_size


@dataclass(frozen=True)
class StepReport:
    """What is known after a step.

    Attributes:
        step: Steps taken so far.
        epsilon: Upper bound on the epsilon spent so far.
        learning_rate: The optimizer's, of its first parameter group.
        test: Test loss, and accuracy or perplexity, if this step was evaluated.
        private: Training loss, gradient norm, clipped fraction and drawn batch size: not covered by
            the guarantee, never to be published.
        stopping: Whether some process of the job was asked to stop.
    """

    step: int
    epsilon: float
    learning_rate: float
    test: Mapping[str, float]
    private: Mapping[str, float]
    stopping: bool = False


class Trainer:
    """Runs a privacy plan: num_steps releases over samples of the data.

    A logical batch is split into physical batches of a fixed size; the last one is padded and
    masked, so the result does not depend on the physical batch size. Before a step draws a unit,
    its budget is checked and its charge is in the ledger.

    Of several processes (see `PrivateStep`'s `parallel`) each runs a trainer of its own and takes
    its share of every draw; the one that leads has the ledger. Nothing is released before all of
    them have joined in, so not before the leader has written the charge.

    Args:
        step: The private step, its model in train mode, its figures those of the plan.
        data: Training records, and test records to evaluate on.
        plan: What is sampled, released and accounted for.
        physical_batch_size: Rows in memory at once.
        seed: Seeds what is random in a step, dropout for example, by (seed, step): the step can
            then be repeated exactly. None leaves PyTorch's generators alone.
        evaluate_every: Steps between evaluations on the test records; the last step always is.
        recipe: Views of the samples, learning rates by step, and an average of the weights.

    Attributes:
        spent: An upper bound on the epsilon after so many steps: the plan's, unless other attempts
            at the run have spent some as well.
        asked_to_stop: Whether this process was asked to stop; the others learn of it.

    Raises:
        ValueError: If the plan contradicts the step, the model is in eval mode, a size is not
            positive, or the data is not what the sampler needs.
    """

    def __init__(
        self,
        step: PrivateStep,
        data: Dataset,
        plan: PrivacyPlan,
        *,
        physical_batch_size: int,
        evaluate_every: int = 10,
        seed: int | None = None,
        recipe: Recipe = PLAIN,
    ) -> None:
        if physical_batch_size < 1:
            raise ValueError(f"Expected physical_batch_size >= 1, got {physical_batch_size}.")
        if evaluate_every < 1:
            raise ValueError(f"Expected evaluate_every >= 1, got {evaluate_every}.")
        if not step.engine.model.training:
            raise ValueError("Expected the model in train mode, got eval mode: call model.train().")
        check_plan(plan, step)
        check_size(plan.sampler, data)
        self.step = step
        self.plan = plan
        self.physical_batch_size = physical_batch_size
        self.evaluate_every = evaluate_every
        self.seed = seed
        self.recipe = recipe
        self._seed_of_views = int(torch.randint(2**62, ())) if seed is None else seed
        self.spent: Callable[[int], float] = plan.spent
        self.asked_to_stop: Callable[[], bool] = lambda: False
        self.draw_from(data)
        check_loss(step.engine.loss_fn, plan.sampler, recipe)
        step.parallel.world.agree(self._draws(), "draws")

    def _draws(self) -> dict[str, str]:
        """What decides the draws, in words that give nothing away: shares are of one draw."""
        key, size = self.plan.sampler.key, len(self.data)
        return {
            "key of the sampler": rng.derive(key, "name of the sampler").hex(),
            "sampler": str(self.plan.sampler.describe()),
            "number of records": rng.derive(key, "number of records", size).hex(),
        }

    def draw_from(self, data: Dataset) -> None:
        """Draws from these records from now on, whatever their number (for tests and audits)."""
        self.data = data
        self._users: Users | None = None
        sampler = self.plan.sampler
        if isinstance(sampler, UserPoisson):
            key = rng.derive(sampler.key, "records of users")
            self._users = Users(data, sampler.records_per_user, key)

    def warm_up(self) -> None:
        """Runs one physical batch of made-up records, and takes the engine's choices as final.

        What is too large for the memory is found here, before any privacy is spent: then the
        physical batch is halved, once. The result stays the same but for rounding.

        Several processes agree on the smallest of their physical batches, and on the choices.

        Raises:
            ValueError: If half of it is too large as well.
        """
        self._fit_physical_batch()
        world, choices = self.step.parallel.world, self.step.engine.choices
        self.physical_batch_size = min(world.gather(self.physical_batch_size))
        choices.made.update(world.broadcast(dict(choices.made)))
        choices.final = True

    def _fit_physical_batch(self) -> None:
        try:
            self.try_physical_batch()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            full = self._rows_at_once()
            if self.step.parallel.even and self.step.parallel.world.size > 1:
                raise ValueError(
                    f"Expected memory for a physical batch, but {full} rows do not fit, and other "
                    "processes wait for this pass. Lower trainer.physical_batch_size, or set auto."
                ) from error
            self.physical_batch_size = max(1, full // 2)
            try:
                self.try_physical_batch()
            except Exception as again:
                if not is_out_of_memory(again):
                    raise
                raise ValueError(
                    f"Expected memory for a physical batch, but neither {full} nor "
                    f"{self.physical_batch_size} rows fit. Lower trainer.physical_batch_size."
                ) from again

    def try_physical_batch(self) -> None:
        """Runs one physical batch of made-up records; nothing of it is kept."""
        size, views = self._rows_at_once(), self.recipe.augmentation
        batch = synthetic_units(self.data, size, self.plan.sampler, views, padded=False)
        place = Placement.of(self.step.engine.model)
        with restored(self.step.engine.model):
            self.step.accumulate(place.batch(batch), torch.ones(size, device=place.device))
        self.step.discard()

    def _rows_at_once(self) -> int:
        return min(self.physical_batch_size, self.plan.sampler.largest_batch())

    def run(self, ledger: Ledger | None = None, until: int | None = None) -> Iterator[StepReport]:
        """Yields a report after each step; ends at the plan's last step, its budget.

        Leaving the loop early, by an exception or Ctrl-C, discards the unfinished step; it stays
        charged in the ledger.

        Args:
            ledger: Where each step is charged before it draws.
            until: An earlier last step.
        """
        last = self.plan.num_steps if until is None else min(until, self.plan.num_steps)
        try:
            while self.step.step < last:  # whoever else releases is counted too
                number = self.step.step
                if self.seed is not None:
                    seed_step(self.seed, number, self.step.parallel.world.rank)
                if ledger is not None:
                    ledger.intend(number, self.plan.noise_at(number))
                contributions, drawn = self._take(number)
                yield self._report(last, contributions, drawn)
        finally:
            self.step.discard()

    def _take(self, number: int) -> tuple[list[Contribution], int]:
        """Takes a step; returns what this process contributed, and how many units were drawn."""
        units = self.data if self._users is None else self._users
        drawn = self.plan.sampler.sample(number, len(units))
        assert not len(drawn) or bool((drawn.diff() > 0).all()), "a unit was drawn twice"
        contributions = [
            self.step.accumulate(batch, mask)
            for batch, mask in self._physical_batches(drawn, number)
        ]
        optimizer, recipe = self.step.optimizer, self.recipe
        for group in optimizer.param_groups if recipe.rates else ():
            group.update(recipe.rates[number])
        self.step.release()
        weights = self.step.engine.parameters.values()
        if recipe.ema_decay is None:
            forget_average(optimizer, weights)
        else:
            update_average(optimizer, weights, recipe.ema_decay, self.step.step)
        return contributions, len(drawn)

    @contextmanager
    def weights_to_publish(self) -> Iterator[None]:
        """Gives the model the weights that are tested and saved: the average, where there is one.

        All processes of a job at once. The weights that are trained are put back.
        """
        step, kept = self.step, self.recipe.ema_decay is not None
        with averaged(step.optimizer, step.engine.parameters.values() if kept else ()):
            yield
            step.parallel.settle(step.engine.model)

    def _physical_batches(self, drawn: Tensor, number: int) -> Iterator[tuple[Batch, Tensor]]:
        """Yields this process's share of a draw in physical batches, each with its mask.

        They are on the model's device, where the views are made.
        """
        size, parallel, users = self._rows_at_once(), self.step.parallel, self._users
        place, views = Placement.of(self.step.engine.model), self.recipe.augmentation
        rows, present = (drawn, None) if users is None else users.choose(drawn, number)
        rows, present = parallel.share(rows), None if present is None else parallel.share(present)
        most = -(-len(drawn) // parallel.world.size) if parallel.even else len(rows)
        for start in range(0, most, size):
            part = slice(start, start + size)
            if users is None or present is None:
                batch: Batch = self.data.take(rows[part])
            else:
                batch = users.take(rows[part], present[part])
            count = len(rows[part])
            padded = partial(pad_rows, rows=size - count)
            batch = place.batch(map_tensors(padded, batch))
            if views is not None:
                batch = views(batch, self._seed_of_views, number, padded(rows[part]))
            yield batch, (torch.arange(size) < count).to(place.device)

    def _report(self, last: int, contributions: list[Contribution], drawn: int) -> StepReport:
        step, parallel, engine = self.step.step, self.step.parallel, self.step.engine
        due = step % self.evaluate_every == 0 or step == last
        rows = min(MOST_ROWS, self._rows_at_once())  # they fit
        test: Mapping[str, float] = {}
        if due:
            with self.weights_to_publish():
                test = evaluate(engine.model, engine.loss_fn, self.data, rows, parallel.world)
        else:
            parallel.settle(engine.model)
        sums = sums_of(contributions, self.plan.clipping.at(step - 1).full_weight)
        told = torch.tensor([*sums, self.asked_to_stop()], dtype=torch.float64)
        parallel.world.sum_(told)
        *totals, asked = told.tolist()
        return StepReport(
            step=step,
            epsilon=self.spent(step),
            learning_rate=self.step.optimizer.param_groups[0]["lr"],
            test=test,
            private=diagnostics(totals, drawn),
            stopping=asked > 0,
        )


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Appends rows of zeros, which the mask silences."""
    return torch.cat([tensor, tensor.new_zeros((rows, *tensor.shape[1:]))]) if rows else tensor
