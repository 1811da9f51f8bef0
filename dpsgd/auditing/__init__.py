"""Audits: what an attacker can measure, beside what is claimed."""

from dpsgd.auditing.bounds import (
    Point,
    epsilon_lower_bound,
    measured_points,
    mu_lower_bound,
    one_run_lower_bound,
    one_run_p_value,
    violations,
)
from dpsgd.auditing.one_run import OneRun, audit_one_run
from dpsgd.auditing.self_checks import Check, self_checks
from dpsgd.auditing.subject import Subject
from dpsgd.auditing.two_worlds import TwoWorlds, audit_two_worlds, check_runs

__all__ = [
    "Check",
    "OneRun",
    "Point",
    "Subject",
    "TwoWorlds",
    "audit_one_run",
    "audit_two_worlds",
    "check_runs",
    "epsilon_lower_bound",
    "measured_points",
    "mu_lower_bound",
    "one_run_lower_bound",
    "one_run_p_value",
    "self_checks",
    "violations",
]
