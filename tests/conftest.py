"""Shared fixtures: everything a test needs is made by the test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.fixture
def key():
    return bytes(range(32))
