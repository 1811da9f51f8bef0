"""T1, T2 and T3 on a configuration: sensitivity, noise law and sampler law."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from scipy import stats
from torch import Tensor

from dpsgd import rng
from dpsgd.auditing.subject import Subject, Units, flat, witness
from dpsgd.sampling import Poisson, Sampler, Shuffled, TruncatedPoisson
from dpsgd.schedules import CONSTANT

_ALARM = 1e-6
_COORDINATES = 20_000
_COMMON = 6
_NOISE = 0.05
_TOLERANCE = 1e-5
_ROUNDING = 1e-7
_STEPS = 2000
_UNITS = 50
_KEYS = 20_000


@dataclass(frozen=True)
class Check:
    """One property, tried.

    Attributes:
        name: Its name.
        passed: Whether it held.
        detail: What was measured, in a sentence.
    """

    name: str
    passed: bool
    detail: str


def self_checks(subject: Subject) -> Iterator[Check]:
    """Yields the checks of a subject, one after another."""
    yield sensitivity(subject)
    yield noise_law(subject)
    yield sampler_law(subject.plan.sampler)


def sensitivity(subject: Subject) -> Check:
    """T1: one hostile unit more, or another one, moves a release by no more than is claimed.

    The release is the noised sum, and the statistic of a policy that learns its clip norm. Both
    worlds have the same coins, by which the unit is drawn, and the same noise.
    """
    sampler = _likely(subject.plan.sampler)
    plan = replace(
        subject.plan,
        sampler=sampler,
        num_steps=1,
        noise_multiplier=max(_NOISE, subject.plan.noise_multiplier / 100),
        noise_schedule=CONSTANT,
    )
    clipping = plan.clipping.at(0)
    limit = plan.movement * clipping.sensitivity
    allowed = limit * (1 + _TOLERANCE)
    allowed += _ROUNDING * plan.noise_multiplier * limit * math.sqrt(subject.coordinates)
    common, replaces = subject.units(_COMMON), plan.adjacency == "replace_one"
    place = _COMMON - 1 if replaces else _COMMON
    key = _key_that_draws(sampler, place, place + 1)
    if key is None:
        detail = f"not tried: no draw out of {_KEYS} contained the {sampler.unit}"
        return Check("T1 sensitivity", False, detail)
    noise_key = rng.fresh_key()

    def released(units: Units) -> Tensor:
        noise = subject.make_noise(noise_key)
        kept = witness(noise)
        for _ in subject.releases(subject.trainer(units, plan, noise, key)):
            pass
        return flat(kept[0].values())

    before, worst, worst_name = released(common), -1.0, "none"
    for name, unit in _hostile(subject):
        world = common[:-1] + unit if replaces else common + unit
        moved = float((released(world) - before).norm())
        if not moved <= worst:  # NaN as well
            worst, worst_name = moved, name
        if not moved <= allowed:
            break
    detail = (
        f"of the hostile {sampler.unit}s the {worst_name} one moves a release the most, by "
        f"{worst:.6g}; at most {limit:.6g} is claimed"
    )
    return Check("T1 sensitivity", worst <= allowed, detail)


def noise_law(subject: Subject) -> Check:
    """T2: every coordinate of releases over no data at all is N(0, (sigma C)^2).

    Read from the gradients that the optimizer is given, times the public divisor.
    """
    plan, noise = subject.plan, subject.make_noise(rng.fresh_key())
    weights = list(subject.engine.parameters.values())
    step = plan.private_step(subject.engine, torch.optim.SGD(weights, lr=0.0), noise)
    step.num_steps = None  # the law may take more releases than the plan has
    values: list[Tensor] = []
    while sum(map(len, values)) < _COORDINATES:
        std = plan.noise_at(step.step) * step.clipping.at(step.step).sensitivity
        step.release()
        gradients = flat(p.grad for p in weights if p.grad is not None)
        values.append(gradients * (plan.expected_batch_size / std))
    step.optimizer.zero_grad(set_to_none=True)
    sample = torch.cat(values)
    total, count = float(sample.square().sum()), len(sample)
    law = stats.chi2(count)
    spread = float(2 * min(law.cdf(total), law.sf(total)))
    shape = float(stats.kstest(sample.numpy(), "norm").pvalue)
    detail = (
        f"{count} coordinates of releases without data have {math.sqrt(total / count):.4f} times "
        f"the claimed standard deviation (p = {spread:.2g}; normal shape p = {shape:.2g})"
    )
    return Check("T2 noise law", min(spread, shape) > _ALARM, detail)


def sampler_law(sampler: Sampler) -> Check:
    """T3: units are drawn as often, and as independently, as is accounted for."""
    sampler = replace(sampler, key=rng.fresh_key(), expected_batch_size=None)
    if isinstance(sampler, Shuffled):
        return _shuffled_law(sampler)
    if not isinstance(sampler, Poisson):
        detail = f"not tried: the law of {type(sampler).__name__} is not known here"
        return Check("T3 sampler law", True, detail)
    q = sampler.rate
    units = max(_UNITS, math.ceil(min(2 / q, 1e6)))
    if isinstance(sampler, TruncatedPoisson):
        units = min(units, sampler.max_batch_size)  # below truncation it is Poisson
    sizes = torch.tensor([len(sampler.sample(step, units)) for step in range(_STEPS)])
    trials, drawn = units * _STEPS, int(sizes.sum())
    law = stats.binom(trials, q)
    rate = float(min(1.0, 2 * min(law.cdf(drawn), law.sf(drawn - 1))))
    variance, expected = float(sizes.double().var()), units * q * (1 - q)
    slack = 6 * math.sqrt(2 / _STEPS + 1 / max(_STEPS * expected, 1e-9))  # of binomial moments
    steady = variance == 0 if q == 1 else abs(variance / expected - 1) < slack
    detail = (
        f"{drawn} of {trials} coins at rate {q:.6g} fell on in (p = {rate:.2g}); the batch size "
        f"has variance {variance:.4g}, {expected:.4g} is claimed"
    )
    return Check("T3 sampler law", rate > _ALARM and steady, detail)


def _shuffled_law(sampler: Shuffled) -> Check:
    size, steps = sampler.public_size or 1, range(sampler.steps_per_epoch)
    drawn = torch.cat([sampler.sample(step, size) for step in steps]).sort().values
    once = torch.equal(drawn, torch.arange(size))
    detail = f"an epoch of {len(steps)} batches makes {len(drawn)} draws of {size} records"
    return Check("T3 sampler law", once, detail + (", each once" if once else ", not each once"))


def _likely(sampler: Sampler) -> Sampler:
    """The sampler at the highest rate that it allows, if its law does not depend on the rate."""
    if isinstance(sampler, TruncatedPoisson):
        assert sampler.public_size is not None
        rate = sampler.max_batch_size / sampler.public_size
        return replace(sampler, sample_rate=min(1.0, rate), expected_batch_size=None)
    if isinstance(sampler, Poisson):
        return replace(sampler, sample_rate=1.0, expected_batch_size=None)
    return sampler


def _key_that_draws(sampler: Sampler, position: int, count: int) -> bytes | None:
    """A key with which the first step draws one of `count` units."""
    for _ in range(_KEYS):
        key = rng.fresh_key()
        drawn = replace(sampler, key=key, expected_batch_size=None).sample(0, count)
        if position in drawn.tolist():
            return key
    return None


def _hostile(subject: Subject) -> Iterator[tuple[str, Units]]:
    unit, canary = subject.units(1), subject.canary()
    yield "ordinary", unit
    yield "large", canary
    if subject.declared.vocab_size is None:
        yield "huge", Units(canary.x * 1e28, canary.y)
        yield "NaN", Units(torch.full_like(canary.x, math.nan), canary.y)
        yield "infinite", Units(torch.full_like(canary.x, math.inf), canary.y)
    else:
        yield "repetitive", Units(torch.zeros_like(unit.x), unit.y)
