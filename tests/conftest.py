"""Shared fixtures: everything a test needs is made by the test."""

import os
import tempfile

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.fixture
def key():
    return bytes(range(32))


# what strategies took is remembered for one run of the tests only
os.environ["DPSGD_CACHE"] = tempfile.mkdtemp(prefix="dpsgd-cache-")
