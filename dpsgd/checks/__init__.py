"""Checks of model, loss and engine that run before any privacy is spent, on synthetic batches.

They never see a private record: a refusal that depended on one would leak it.
"""

from dpsgd.checks.agreement import check_agreement, check_coverage
from dpsgd.checks.batch_norm import replace_batch_norm
from dpsgd.checks.comparison import relative_gap, tolerance
from dpsgd.checks.containment import check_containment
from dpsgd.checks.dropout import without_dropout
from dpsgd.checks.independence import check_independence
from dpsgd.checks.preflight import Preflight, preflight
from dpsgd.checks.state import check_runs, check_unchanged_state, restored
from dpsgd.checks.synthetic import synthetic_batch, synthetic_units, synthetic_users

__all__ = [
    "Preflight",
    "check_agreement",
    "check_containment",
    "check_coverage",
    "check_independence",
    "check_runs",
    "check_unchanged_state",
    "preflight",
    "relative_gap",
    "replace_batch_norm",
    "restored",
    "synthetic_batch",
    "synthetic_units",
    "synthetic_users",
    "tolerance",
    "without_dropout",
]
