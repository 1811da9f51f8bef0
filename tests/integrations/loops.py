"""What the tests of the integrations share: small plans, and the loop that they must equal."""

from torch.utils._pytree import tree_leaves, tree_map

from dpsgd import clipping, engines, noise, sampling
from dpsgd.plan import PrivacyPlan

NOISE = bytes(range(1, 33))


def plan_of(num_steps=7, sample_rate=0.2, size=40, key=bytes(range(32)), policy=clipping.Flat(0.5)):
    sampler = sampling.Poisson(sample_rate=sample_rate, public_size=size, key=key)
    return PrivacyPlan.make(
        sampler, policy, num_steps=num_steps, target_delta=1e-3, noise_multiplier=0.8
    )


def trained_by_hand(plan, model, loss_fn, records, optimizer, scheduler=None):
    """Returns the parameters after a plain loop: whole draws, the oracle, the same keys."""
    step = plan.private_step(engines.Loop(model, loss_fn), optimizer, noise.Gaussian(NOISE))
    size = len(tree_leaves(records)[0])
    for number in range(plan.num_steps):
        drawn = plan.sampler.sample(number, size)
        step(tree_map(lambda t, drawn=drawn: t[drawn], records))
        if scheduler is not None:
            scheduler.step()
    return [p.detach() for p in model.parameters()]
