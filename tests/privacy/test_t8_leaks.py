"""T8: what is published of a run is the same for D and D', the weights being the same.

The two worlds differ in private records alone: their number, labels and inputs. With C so small
that nothing of them reaches the weights in float32, and the same key, the released weights agree
(without momentum, whose buffer is no weight but the noised sums themselves);
so must every public file, once times are set apart.
"""

import json
import re

import pytest
import torch
from command_line import command
from safetensors.torch import save_file

KEY = "privacy.key='" + "cd" * 32 + "'"
TIMES = [rb'"seconds": [\d.e+-]+', rb'"speed/expected_records_per_second": [\d.e+-]+']


def run(tmp_path, name, records, *extra):
    folder = tmp_path / name
    folder.mkdir()
    generator = torch.Generator().manual_seed(records)
    x = torch.rand(records, 6, generator=generator)
    y = torch.randint(3, (records,), generator=generator)
    test = torch.Generator().manual_seed(0)
    tensors = {
        "x": x,
        "y": y,
        "x_test": torch.rand(20, 6, generator=test),
        "y_test": torch.randint(3, (20,), generator=test),
    }
    save_file(tensors, folder / "data.safetensors")
    done = command(
        "data=tensors", "data.path=data.safetensors", "data.input_shape=[6]", "data.num_classes=3",
        "data.public_size=40", "model=linear", "trainer.num_steps=5", "sampler.sample_rate=0.4",
        "trainer.physical_batch_size=8", "privacy.noise_multiplier=2",
        "clipping.max_grad_norm=1e-29", "trainer.evaluate_every=2", "optimizer.momentum=0",
        "device=cpu", "run.dir=r", KEY, *extra, cwd=folder,
    )  # fmt: skip
    return folder / "r", done


def public(folder):
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.startswith("private"):
            content = path.read_bytes()
            if name.startswith("tensorboard"):
                name, content = "tensorboard", events(path)
            for pattern in TIMES:
                content = re.sub(pattern, b"", content)
            files[name] = re.sub(rb"[\d.]+ s(econds)?\b", b"", content)
    return files


def events(path):
    """The scalars of an event file; times and CRCs are left out, sizes are not."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    rows = []
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            figure = None if value.tag.startswith("speed") else value.tensor.float_val[:]
            rows.append((event.step, value.tag, figure))
    return json.dumps(rows, default=list).encode()


@pytest.mark.parametrize("extra", [(), ("clipping=per_layer", "clipping.max_grad_norm=1e-29")])
def test_public_files_do_not_depend_on_private_records(extra, tmp_path):
    first, one = run(tmp_path, "a", 40, *extra)
    second, other = run(tmp_path, "b", 61, *extra)
    a, b = public(first), public(second)
    assert a.keys() == b.keys() >= {"ledger.jsonl", "metrics.jsonl", "report.json", "config.yaml"}
    for name, content in a.items():
        assert content == b[name], f"{name} tells the worlds apart"

    def plain(done):
        text = re.sub(r"[\d.]+ s\b|\d+:\d+:\d+", "", done.stdout)
        return re.sub(r"\s+", " ", re.sub(r"[━╸╺]", "", text)), done.stderr

    assert plain(one) == plain(other)


def test_the_check_sees_a_difference(tmp_path):
    """A larger C lets the records reach the weights, and the comparison must notice."""
    first, _ = run(tmp_path, "a", 40, "clipping.max_grad_norm=1")
    second, _ = run(tmp_path, "b", 61, "clipping.max_grad_norm=1")
    assert public(first)["model.safetensors"] != public(second)["model.safetensors"]
    assert public(first)["metrics.jsonl"] != public(second)["metrics.jsonl"]
