import pytest

from dpsgd.benchmark.measurement import Measurement, median_interval


def test_the_interval_drops_as_many_order_statistics_as_95_percent_allow():
    assert median_interval([9, 1, 8, 2, 7, 3, 6, 4, 5]) == (2, 8, 1 - 2 * 10 / 2**9)


def test_few_values_give_their_range_with_its_true_coverage():
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0, 0.75)
    assert median_interval([3.0]) == (3.0, 3.0, 0.0)


@pytest.mark.parametrize("n", range(6, 40))
def test_the_coverage_is_kept_and_the_next_narrower_interval_would_lose_it(n):
    low, high, coverage = median_interval(range(1, n + 1))
    assert low + high == n + 1
    assert coverage >= 0.95
    if high - low > 2:
        narrower = 1 - 2 * sum(_binomial(n, i) for i in range(low + 1)) / 2**n
        assert narrower < 0.95


def _binomial(n, k):
    return 1 if k == 0 else _binomial(n, k - 1) * (n - k + 1) // k


def test_the_ratio_is_that_of_medians():
    baseline = Measurement("non-private", (1.0, 2.0, 9.0))
    assert Measurement("vmap", (8.0, 1.0, 6.0)).ratio(baseline) == 3.0


def test_a_refusal_has_no_figures():
    row = Measurement("hooks", refusal="No rule.").as_dict(Measurement("non-private", (1.0,)))
    assert row["refusal"] == "No rule."
    assert row["median_seconds"] is row["median_interval"] is row["ratio"] is None
