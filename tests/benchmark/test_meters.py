import sys

import pytest
import torch

from dpsgd.benchmark import meters
from dpsgd.benchmark.memory import peak_memory

MIB = 2**20
CPU = torch.device("cpu")


def held_for_a_moment(mib):
    def step():
        torch.ones(mib * MIB // 4)

    return step


def test_a_step_that_takes_64_mib_for_a_moment_shows_them():
    memory = peak_memory(held_for_a_moment(64), meters.meter_for(CPU))
    assert 60 < memory.peak_mib < 90
    assert 60 < memory.first_step_mib < 90


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_first_step_is_told_apart_where_peaks_can_be_reset():
    steps = iter([held_for_a_moment(256), held_for_a_moment(64), held_for_a_moment(64)])
    meter = meters.meter_for(CPU)
    if not isinstance(meter, meters.ResidentSet):
        pytest.skip("this system does not reset peaks")
    memory = peak_memory(lambda: next(steps)(), meter)
    assert memory.first_step_mib > 250
    assert memory.peak_mib < 128


def test_without_proc_the_peak_of_the_process_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(meters, "_PROC", tmp_path / "none")
    meter = meters.meter_for(CPU)
    assert isinstance(meter, meters.MaxResidentSet)
    assert 10 < meter.peak() < 1e6
