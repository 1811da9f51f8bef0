"""Private training in the loops of other libraries, each imported by its own module alone."""

from dpsgd.integrations.private_run import PrivateRun

__all__ = ["PrivateRun"]
