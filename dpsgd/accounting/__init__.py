"""Privacy accounting, all of it by Google's dp-accounting."""

from dpsgd.accounting.batch_choice import BatchChoice, batch_choices, recommended
from dpsgd.accounting.calibration import (
    calibrate_noise_multiplier,
    calibrate_num_steps,
    calibrate_sample_rate,
)
from dpsgd.accounting.curve import Curve
from dpsgd.accounting.releases import AccountantName, Adjacency, Releases, as_event, neighbouring
from dpsgd.accounting.spending import deltas_of, epsilon, epsilon_of, random_stopping_epsilon
from dpsgd.accounting.tradeoff import TradeOff, gaussian_epsilon, mu_of, tradeoff_of

__all__ = [
    "AccountantName",
    "Adjacency",
    "BatchChoice",
    "Curve",
    "Releases",
    "TradeOff",
    "as_event",
    "batch_choices",
    "calibrate_noise_multiplier",
    "calibrate_num_steps",
    "calibrate_sample_rate",
    "deltas_of",
    "epsilon",
    "epsilon_of",
    "gaussian_epsilon",
    "mu_of",
    "neighbouring",
    "random_stopping_epsilon",
    "recommended",
    "tradeoff_of",
]
