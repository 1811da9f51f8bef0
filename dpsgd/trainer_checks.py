"""What a trainer checks before it draws a record: do its parts belong together?"""

from __future__ import annotations

from collections.abc import Sized

from dpsgd.engines import LossFn
from dpsgd.losses import MeanOfViews, PerUser
from dpsgd.plan import PrivacyPlan
from dpsgd.private_step import PrivateStep
from dpsgd.recipe import Recipe
from dpsgd.sampling import Sampler, UserPoisson


def check_plan(plan: PrivacyPlan, step: PrivateStep) -> None:
    """Raises unless the step has the figures of the plan."""
    for name, planned, actual in (
        ("noise_multiplier", plan.noise_multiplier, step.noise_multiplier),
        ("noise_schedule", plan.noise_schedule, step.noise_schedule),
        ("batch_schedule", plan.sampler.factors, step.batch_schedule),
        ("expected_batch_size", plan.expected_batch_size, step.expected_batch_size),
        ("clipping", plan.clipping, step.clipping),
    ):
        if planned != actual:
            raise ValueError(
                f"Expected {name}={planned} as in the privacy plan, got {actual}. "
                "plan.private_step(engine, optimizer, noise) makes a step that agrees."
            )


def check_loss(loss_fn: LossFn, sampler: Sampler, recipe: Recipe) -> None:
    """Raises unless the loss is of the units that are sampled, and of their views."""
    of_users = isinstance(loss_fn, PerUser)
    if isinstance(sampler, UserPoisson) != of_users:
        raise ValueError(
            "Expected a loss per user for user-level sampling, and only for it: "
            "dpsgd.losses.PerUser(loss_fn)."
        )
    record: object = loss_fn.loss_fn if isinstance(loss_fn, PerUser) else loss_fn
    if (recipe.augmentation is not None) != isinstance(record, MeanOfViews):
        raise ValueError(
            "Expected a loss of several views for an augmentation, and only for it: "
            "dpsgd.losses.MeanOfViews(loss_fn)."
        )


def check_size(sampler: Sampler, data: Sized) -> None:
    """Raises if the guarantee needs the declared size to be the true one, and it is not."""
    if sampler.size_is_public and len(data) != sampler.public_size:
        raise ValueError(
            f"Expected as many training records as declared (public_size={sampler.public_size}) "
            f"for {type(sampler).__name__} sampling, whose guarantee rests on it, got another "
            "number. Declare the true number, or use sampler=poisson."
        )
