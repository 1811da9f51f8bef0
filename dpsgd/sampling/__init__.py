"""Samplers: which records, or users, join a step."""

from dpsgd.sampling.base import Sampler
from dpsgd.sampling.descriptions import described
from dpsgd.sampling.poisson import Poisson
from dpsgd.sampling.shuffled import Shuffled
from dpsgd.sampling.truncated import TruncatedPoisson
from dpsgd.sampling.users import UserPoisson

__all__ = ["Poisson", "Sampler", "Shuffled", "TruncatedPoisson", "UserPoisson", "described"]
