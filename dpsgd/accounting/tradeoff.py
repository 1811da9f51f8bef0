"""The trade-off between the errors of an attacker who tests whether a record was used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpsgd.accounting.releases import AccountantName, Adjacency, Releases
from dpsgd.accounting.spending import deltas_of, epsilon_of

_POINTS = 300
_LEAST_DELTA = 1e-12
_RATES = 400


class TradeOff:
    """A lower bound on an attacker's false negative rate at each false positive rate.

    A trade-off function (Dong et al. 2019, arXiv:1905.02383). It is the envelope of what (epsilon,
    delta) says for many epsilons at once: at a false positive rate a, the false negative rate is at
    least 1 - delta - e^epsilon a and e^-epsilon (1 - delta - a). Valid between the computed points
    as well, since each of them holds alone.

    Args:
        epsilons: Values >= 0.
        deltas: The delta at each of them.
    """

    def __init__(
        self, epsilons: Sequence[float] | np.ndarray, deltas: Sequence[float] | np.ndarray
    ) -> None:
        self._epsilons = np.asarray(epsilons, dtype=np.float64)
        self._deltas = np.asarray(deltas, dtype=np.float64)

    def __call__(self, false_positive_rate: float) -> float:
        """Returns the least false negative rate that any test can have.

        Raises:
            ValueError: If the rate is not in [0, 1].
        """
        rate = false_positive_rate
        if not 0 <= rate <= 1:
            raise ValueError(f"Expected 0 <= false_positive_rate <= 1, got {rate}.")
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large bounds nothing
            steep = np.nan_to_num(1 - self._deltas - np.exp(self._epsilons) * rate, nan=0.0)
        flat = np.exp(-self._epsilons) * (1 - self._deltas - rate)
        return float(max(0.0, steep.max(), flat.max()))

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Returns the most power that any test can have at a false positive rate."""
        return 1 - self(false_positive_rate)

    def mu(self, least_rate: float) -> float:
        """Returns the least mu whose Gaussian trade-off curve lies below this one.

        A mechanism with such a curve is mu-Gaussian-DP as far as attacks with false positive and
        false negative rates of at least `least_rate` go: as hard to attack as telling N(0, 1) from
        N(mu, 1).

        Args:
            least_rate: The smallest error rate that is looked at, in (0, 0.5); delta is a choice.

        Raises:
            ValueError: If the rate is out of range.
        """
        from scipy.stats import norm

        if not 0 < least_rate < 0.5:
            raise ValueError(f"Expected 0 < least_rate < 0.5, got {least_rate}.")
        rates = np.geomspace(least_rate, 0.5, _RATES)
        missed = np.array([self(float(rate)) for rate in rates])
        seen = missed >= least_rate
        seen[0] = True  # where nearly nothing is missed, this is all there is to see
        return max(0.0, float((norm.isf(rates) - norm.ppf(missed))[seen].max()))


def tradeoff_of(
    releases: Releases, accountant: AccountantName = "pld", adjacency: Adjacency = "add_remove"
) -> TradeOff:
    """Returns the trade-off curve of any releases.

    Raises:
        ValueError: If the pair of accountant and adjacency is unsound.
    """
    reach = epsilon_of(releases, _LEAST_DELTA, accountant, adjacency)
    if reach == float("inf"):
        return TradeOff([0.0], [1.0])
    epsilons = np.linspace(0.0, max(reach, 1e-9), _POINTS)
    return TradeOff(epsilons, deltas_of(releases, epsilons, accountant, adjacency))


def mu_of(
    releases: Releases,
    delta: float,
    accountant: AccountantName = "pld",
    adjacency: Adjacency = "add_remove",
) -> float:
    """Returns the Gaussian-DP mu of any releases for attacks with error rates of at least delta.

    Its epsilon at delta is at least that of the releases, and its trade-off curve lies below theirs
    at all false positive and false negative rates from delta on.

    Raises:
        ValueError: If the pair of accountant and adjacency is unsound.
    """
    import dp_accounting

    spent = epsilon_of(releases, delta, accountant, adjacency)
    if spent == 0 or spent == float("inf"):
        return spent
    at_delta = 1 / dp_accounting.get_sigma_gaussian(spent, delta)
    return max(at_delta, tradeoff_of(releases, accountant, adjacency).mu(delta))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Returns the epsilon of mu-Gaussian-DP at delta (Dong et al. 2019, arXiv:1905.02383)."""
    import dp_accounting

    if mu <= 0:
        return 0.0
    return float(dp_accounting.get_epsilon_gaussian(1 / mu, delta))
