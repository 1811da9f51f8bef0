"""Steps that several processes take together, against the same step in one process."""

import pytest
import torch
from jobs import program
from parallel_programs import BATCH, batch_of, loss_fn, model_of, private_step

from dpsgd.engines import Ghost, Loop

MODELS = [
    "blocks", "frozen", "recomputed", "scaled", "weight_norm", "twice", "lstm", "tied", "conv",
    "custom",
]  # fmt: skip


def dealt(rows, processes):
    return [rows[rank::processes] for rank in range(processes)]


@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_model_has_the_norms_of_the_whole_one(name, tmp_path):
    expected = Loop(model_of(name), loss_fn)(batch_of())
    found = program("sharded_norms", name, processes=2, cwd=tmp_path)
    for one, norms, losses in zip(
        found, dealt(expected.norms()[:, 0], 2), dealt(expected.losses, 2), strict=True
    ):
        assert norms.min() > 0
        torch.testing.assert_close(one["norms"], norms, rtol=1e-10, atol=0)
        torch.testing.assert_close(one["losses"], losses, rtol=1e-10, atol=0)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["blocks", "frozen", "weight_norm", "tied"])
def test_weights_are_those_of_one_process(way, name, tmp_path):
    model = model_of(name)
    step = private_step(model, None)
    step(batch_of(0))
    step.release()
    step(batch_of(2))
    for processes in (2, 4) if name == "blocks" else (3,):
        found = program("trained", way, name, processes=processes, cwd=tmp_path)
        for ranks_own in found[: 1 if way == "fsdp" else None]:
            for key, weight in ranks_own.items():
                torch.testing.assert_close(weight, model.state_dict()[key], rtol=1e-12, atol=1e-12)


def test_a_private_step_communicates_as_an_ordinary_one(tmp_path):
    private = program("counted", "private", processes=2, cwd=tmp_path)
    ordinary = program("counted", "", processes=2, cwd=tmp_path)
    assert ordinary[0]["c10d::_reduce_scatter_base_"] == 2  # the blocks, and the rest
    for one, other in zip(private, ordinary, strict=True):
        assert one.pop("c10d::allreduce_") == 2  # a few numbers: are all at the same place?
        assert one == other


def test_each_process_draws_the_noise_of_its_part_alone(tmp_path):
    found = program("drawn_noise", processes=3, cwd=tmp_path)
    spans = sorted(span for one in found for span in one["drawn"] if span[1])
    ends = [0, *(start + count for start, count in spans)]
    assert [start for start, _ in spans] == ends[:-1]
    assert ends[-1] == found[0]["parameters"]
    assert all(sum(n for _, n in one["drawn"]) < 0.6 * ends[-1] for one in found)


REFUSALS = {
    "draws": "Expected the same draws in all 2 processes, got\n  key of the sampler",
    "no parallel": "Expected parallel=dpsgd.parallel.ddp() or fsdp() in a job of 2 processes",
    "used twice": "Expected one way of parallelism for each PrivateStep",
    "another step": "Expected all 2 processes at the same place of the same step",
    "frozen on one": "differ in: trainable parameters or clipping",
    "a pass less": "differ in: which call it is",
    "no rows": "differ in: whether there are rows",
    "ddp of shards": "Expected parallel=dpsgd.parallel.fsdp() for a model",
    "sharded later": "the model has others by now",
    "key": "Expected the same figures of the private step in all 2 processes, got\n  key of",
    "weights": "Expected the same initial weights in all 2 processes, got\n  0.bias: process",
    "clipping": "process 0: Flat(max_grad_norm=1.0",
    "engine": "Expected engine=ghost for parallel=fsdp, got Vmap",
    "engine alone": "Hooks cannot run a model that FSDP2 has sharded. Use engine=ghost",
    "not sharded": "Expected parameters sharded by rows over all 2 processes",
    "uncaptured": "engine=ghost does not see it",
    "splits": "the samples disagree about control flow",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused_on_every_process(case, tmp_path):
    for said in program("refused", case, processes=2, cwd=tmp_path):
        assert REFUSALS[case] in said


def test_a_sharded_parameter_that_is_not_looked_up_in_time_is_an_error(tmp_path, monkeypatch):
    """What a prototype did: names resolved before the forward pass, norms of 0 without a word."""
    from dpsgd.engines import sharding

    names = sharding.Names(model_of("blocks"), {})
    names.sharded = True
    engine = Ghost(model_of("blocks"), loss_fn)
    monkeypatch.setattr("dpsgd.engines.ghost.engine.Names", lambda *_: names)
    with pytest.raises(ValueError, match="is no parameter of the model"):
        engine(batch_of())
    assert len(batch_of()[0]) == BATCH
