"""Shared fixtures: everything a test needs is made by the test."""

import os
import tempfile

import pytest
import runs
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.fixture
def key():
    return bytes(range(32))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A run that nobody interrupted, for comparison."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs.finish(folder)
    return folder


# what strategies took is remembered for one run of the tests only
os.environ["DPSGD_CACHE"] = tempfile.mkdtemp(prefix="dpsgd-cache-")
