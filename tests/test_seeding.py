"""Seeds and repeatability."""

import os
import random

import numpy as np
import pytest
import torch

from dpsgd import seed_everything


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_a_seed_repeats_every_generator(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    seed_everything(7)
    first = draws()
    seed_everything(7)
    assert draws() == first
    seed_everything(8)
    assert draws() != first
    assert os.environ["PYTHONHASHSEED"] == "8"
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_gymnasium_environments_are_seeded_by_reset():
    class Environment:
        def reset(self, *, seed=None):
            self.seeded = seed

    env = Environment()
    seed_everything(3, env)
    assert env.seeded == 3


def test_older_environments_are_seeded_by_seed():
    class Environment:
        def seed(self, seed):
            self.seeded = seed

    env = Environment()
    seed_everything(3, env)
    assert env.seeded == 3


def test_an_environment_without_seeding_is_refused():
    with pytest.raises(ValueError, match="environment"):
        seed_everything(3, object())


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "7"])
def test_a_senseless_seed_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        seed_everything(seed)
