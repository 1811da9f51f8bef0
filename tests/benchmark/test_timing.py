import pytest
import torch

from dpsgd.benchmark.timing import Schedule, interleaved

CPU = torch.device("cpu")


def names(ticks, counts):
    return "".join(tick.name for tick in ticks if tick.counts is counts)


def run(steps, warmup=1, repetitions=3, max_seconds=60.0):
    return list(interleaved(steps, Schedule(warmup, repetitions, max_seconds), CPU))


def test_systems_take_turns():
    calls = []
    ticks = run({name: lambda name=name: calls.append(name) for name in "ABC"}, warmup=2)
    assert names(ticks, counts=False) == "ABCABC"
    assert names(ticks, counts=True) == "ABCABCABC"
    assert "".join(calls) == "ABCABC" + "ABCABCABC"


def refuse():
    raise ValueError("not this model")


def test_a_system_that_refuses_drops_out_and_the_others_go_on():
    ticks = run({"A": list, "B": refuse, "C": list})
    assert names(ticks, counts=False) == "ABC"
    assert names(ticks, counts=True) == "ACACAC"
    assert [tick.refusal for tick in ticks if tick.name == "B"] == ["not this model"]


def exhaust():
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate a lot.")


def test_running_out_of_memory_is_a_refusal():
    refusals = [t.refusal for t in run({"A": list, "B": exhaust}) if t.name == "B"]
    assert refusals == ["Out of memory: CUDA out of memory."]


def blunder():
    raise RuntimeError("a mistake in the code")


def test_a_mistake_in_the_code_is_not_hidden():
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        run({"A": blunder})


@pytest.mark.parametrize(
    ("seconds", "allowed"), [(0.0, 9), (1.0, 9), (2.5, 4), (10.0, 1), (100.0, 1)]
)
def test_slow_systems_get_fewer_repetitions_and_one_at_least(seconds, allowed):
    assert Schedule(1, 9, max_seconds=10.0).allowed(seconds) == allowed


@pytest.mark.parametrize("numbers", [(0, 9, 1.0), (1, 0, 1.0), (1, 9, 0.0), (1, 9, float("nan"))])
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(ValueError, match=r"Expected bench\.\w+ >"):
        Schedule(*numbers)
