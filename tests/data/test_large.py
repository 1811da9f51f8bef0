"""More records than one would want in memory."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dpsgd import replay
from dpsgd.data import tensors
from dpsgd.sampling import Poisson

RECORDS = 10_000_000


def anonymous_memory():
    """Bytes of this process that are not pages of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("large")
    for name, dtype, shape in (("x", np.float32, (RECORDS, 16)), ("y", np.int64, (RECORDS,))):
        array = np.lib.format.open_memmap(path / f"{name}.npy", "w+", dtype=dtype, shape=shape)
        array[7] = 1  # the file is sparse: nothing else is on the disk
        array.flush()
    return path


def test_ten_million_records_take_no_memory(folder, key):
    before = anonymous_memory()
    data = tensors(folder, input_shape=[4, 4], num_classes=3, public_size=RECORDS)
    assert len(replay.fingerprint(data, key)) == 64
    sampler = Poisson(expected_batch_size=1000, public_size=RECORDS, key=key)
    sizes = []
    for step in range(20):
        rows = sampler.sample(step, len(data))
        x, _ = data.take(rows)
        assert x.shape == (len(rows), 4, 4)
        sizes.append(len(rows))
    assert anonymous_memory() - before < 100e6, "the records take 720 MB"
    assert abs(sum(sizes) / 20 - 1000) < 50
    assert data.take(torch.tensor([7]))[1].item() == 1


def test_a_step_draws_from_ten_million_records_quickly(key):
    sampler = Poisson(expected_batch_size=1000, public_size=RECORDS, key=key)
    sampler.sample(0, RECORDS)
    begun = time.process_time()
    for step in range(1, 21):
        sampler.sample(step, RECORDS)
    assert time.process_time() - begun < 20 * 0.5, "O(q N), not O(N)"


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Add x and y"):
        tensors(tmp_path, input_shape=[4], num_classes=3, public_size=9)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"nonsense"])
def test_a_damaged_file_is_refused(content, tmp_path):
    np.save(tmp_path / "y.npy", np.zeros(3, dtype=np.int64))
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"complete \.npy"):
        tensors(tmp_path, input_shape=[4], num_classes=3, public_size=9)


def test_objects_are_refused(tmp_path):
    np.save(tmp_path / "y.npy", np.zeros(3, dtype=np.int64))
    np.save(tmp_path / "x.npy", np.array([[1], [1, 2]], dtype=object))
    with pytest.raises(ValueError, match=r"complete \.npy"):
        tensors(tmp_path, input_shape=[4], num_classes=3, public_size=9)
