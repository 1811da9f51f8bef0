"""T1, T2 and T3 on a configuration: sensitivity, noise law and sampler law."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from scipy import stats
from torch import Tensor

from dpsgd import rng
from dpsgd.auditing.noise_law import looked_at, noise_p_values
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
_UNITS = 400
_SEED = 0
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
    worlds have the same coins, by which the unit is drawn, the same noise, and the same dropout.
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
        trainer = subject.trainer(units, plan, noise, key)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            for _ in subject.releases(trainer):
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
    """T2: every coordinate of releases over no data at all is N(0, (sigma C)^2), and new.

    Read from the gradients that the optimizer is given, times the public divisor.
    """
    plan, noise = subject.plan, subject.make_noise(rng.fresh_key())
    weights = list(subject.engine.parameters.values())
    step = plan.private_step(subject.engine, torch.optim.SGD(weights, lr=0.0), noise)
    step.num_steps = None  # the law may take more releases than the plan has
    releases: list[list[Tensor]] = []
    while len(releases) < 2 or len(releases) * sum(map(len, releases[0])) < _COORDINATES:
        std = plan.noise_at(step.step) * step.clipping.at(step.step).sensitivity
        divisor = plan.expected_batch_size_at(step.step)
        step.release()
        gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in weights]
        releases.append([looked_at(g) * (divisor / std) for g in gradients])
    step.optimizer.zero_grad(set_to_none=True)
    parameters = [torch.stack(each) for each in zip(*releases, strict=True)]
    found = noise_p_values(parameters)
    sample = torch.cat([each.flatten() for each in parameters])
    words = ", ".join(f"{name} {p:.2g}" for name, p in found.items())
    detail = (
        f"{len(sample)} coordinates of {len(releases)} releases without data have "
        f"{float(sample.square().mean().sqrt()):.4f} times the claimed standard deviation "
        f"(p-values: {words})"
    )
    passed = all(p > _ALARM for p in found.values())  # False for NaN as well
    return Check("T2 noise law", passed, detail)


def sampler_law(sampler: Sampler) -> Check:
    """T3: units are drawn as often, and as independently, as is accounted for."""
    sampler = replace(sampler, key=rng.fresh_key(), expected_batch_size=None)
    if isinstance(sampler, Shuffled):
        return _shuffled_law(sampler)
    if not isinstance(sampler, Poisson):
        detail = f"not tried: the law of {type(sampler).__name__} is not known here"
        return Check("T3 sampler law", True, detail)
    starts = list(sampler.factors.factors)
    found = [
        _coins(sampler, range(start, min(end, start + _STEPS)))
        for start, end in zip(starts, [*starts[1:], starts[-1] + _STEPS], strict=True)
    ]
    detail = "; then ".join(words for _, words in found)
    return Check("T3 sampler law", all(passed for passed, _ in found), detail)


def _coins(sampler: Poisson, steps: range) -> tuple[bool, str]:
    """Whether the coins of steps of one rate fall as they should, and how they do, in words."""
    q = sampler.rate_at(steps[0])
    units = max(_UNITS, math.ceil(min(2 / q, 1e6)))
    if isinstance(sampler, TruncatedPoisson):
        units = min(units, sampler.max_batch_size)  # below truncation it is Poisson
    draws = [sampler.sample(step, units) for step in steps]
    sizes = torch.tensor([len(drawn) for drawn in draws])
    counts = torch.cat(draws).bincount(minlength=units)
    trials, drawn = units * len(steps), int(sizes.sum())
    law = stats.binom(trials, q)
    rate = float(min(1.0, 2 * min(law.cdf(drawn), law.sf(drawn - 1))))
    sizes_vary = _varies(sizes, units, q)
    counts_vary = _varies(counts, len(steps), q)
    detail = (
        f"{drawn} of {trials} coins at rate {q:.6g} fell on in (p = {rate:.2g}); the batch size "
        f"varies {sizes_vary[1]}, and how often a {sampler.unit} is drawn {counts_vary[1]}"
    )
    return rate > _ALARM and sizes_vary[0] and counts_vary[0], detail


def _varies(counts: Tensor, trials: int, q: float) -> tuple[bool, str]:
    """Whether binomial counts have the variance that they should, and how they do, in words."""
    if q == 1:
        return bool((counts == trials).all()), "not at all, as it should"
    variance = trials * q * (1 - q)
    ratio = float((counts - trials * q).double().square().mean()) / variance
    slack = 6 * math.sqrt((2 + 1 / variance) / len(counts))  # of binomial moments
    return abs(ratio - 1) < slack, f"{ratio:.3g} times as much as claimed"


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
        return replace(sampler, sample_rate=min(1.0, rate), expected_batch_size=None, schedule=None)
    if isinstance(sampler, Poisson):
        return replace(sampler, sample_rate=1.0, expected_batch_size=None, schedule=None)
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
