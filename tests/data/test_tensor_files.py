"""Tensors in files: two formats, and everything that a file can lack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dpsgd.data import tensors

X, Y = np.arange(24, dtype=np.float32).reshape(4, 6), np.array([0, 2, 1, 0])


def write_npz(path, **arrays):
    np.savez(path, **arrays)


def write_safetensors(path, **arrays):
    save_file({name: torch.tensor(array) for name, array in arrays.items()}, path)


WRITERS = {".npz": write_npz, ".safetensors": write_safetensors}


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    def write(**arrays):
        path = tmp_path / f"data{request.param}"
        WRITERS[request.param](path, **arrays)
        return path

    return write


def read(path, **changes):
    arguments = {"input_shape": [2, 3], "num_classes": 3, "public_size": 10}
    return tensors(path, **{**arguments, **changes})


def test_records_are_reshaped(write):
    data = read(write(x=X, y=Y))
    assert torch.equal(data.train[0], torch.tensor(X).view(4, 2, 3))
    assert data.train[1].tolist() == Y.tolist()


def test_without_a_test_set(write):
    assert read(write(x=X, y=Y)).test is None


def test_with_a_test_set(write):
    data = read(write(x=X, y=Y, x_test=X[:2], y_test=Y[:2]))
    assert [len(part) for part in data.test] == [2, 2]


@pytest.mark.parametrize("half", ["x_test", "y_test"])
def test_half_a_test_set(write, half):
    with pytest.raises(ValueError, match="Expected tensors x_test and y_test"):
        read(write(x=X, y=Y, **{half: Y}))


@pytest.mark.parametrize("missing", ["x", "y"])
def test_a_missing_tensor_is_named(write, missing):
    arrays = {"x": X, "y": Y}
    del arrays[missing]
    with pytest.raises(ValueError, match=f"Add {missing}"):
        read(write(**arrays))


def test_a_truncated_file(write):
    path = write(x=X, y=Y)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="Expected a complete"):
        read(path)


@pytest.mark.parametrize("suffix", WRITERS)
def test_an_empty_file(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    path.touch()
    with pytest.raises(ValueError, match="Expected a complete"):
        read(path)


@pytest.mark.parametrize("suffix", WRITERS)
def test_no_such_file(tmp_path, suffix):
    with pytest.raises(ValueError, match=r"Expected a file at .*nowhere\."):
        read(tmp_path / f"nowhere{suffix}")


def test_corrupted_contents(tmp_path):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(400, 6)), y=Y)
    contents = bytearray(path.read_bytes())
    contents[2000:2100] = bytes(100)
    path.write_bytes(bytes(contents))
    with pytest.raises(ValueError, match="Expected a complete"):
        read(path)


@pytest.mark.parametrize("array", [np.array([{}, {}]), np.array(["a", "b"])])
def test_objects_and_strings_are_refused(tmp_path, array):
    path = tmp_path / "data.npz"
    np.savez(path, x=array, y=Y[:2], allow_pickle=True)
    with pytest.raises(ValueError, match="without objects or strings"):
        read(path)


def test_an_unknown_format(tmp_path):
    with pytest.raises(ValueError, match=r"or a folder of \.npy files, got data\.pt"):
        read(tmp_path / "data.pt")


def test_a_shape_that_does_not_fit(write):
    with pytest.raises(ValueError, match="7 values each"):
        read(write(x=X, y=Y), input_shape=[7])


def test_classes_are_not_derived_from_the_labels(write):
    with pytest.raises(ValueError, match=r"labels within 0\.\.1"):
        read(write(x=X, y=Y), num_classes=2)


def test_token_ids(write):
    data = read(write(x=X.astype(np.int32), y=Y), input_shape=[6], vocab_size=24)
    assert data.train[0].dtype == torch.int64


def test_regression(write):
    data = read(write(x=X, y=Y.astype(np.float64)), num_classes=None)
    assert data.train[1].dtype == torch.float32


def test_bytes_are_not_scaled(write):
    data = read(write(x=np.full((4, 6), 255, dtype=np.uint8), y=Y))
    assert data.train[0].eq(255).all()


def test_half_precision_is_widened(write):
    data = read(write(x=X.astype(np.float16), y=Y))
    assert torch.equal(data.train[0].flatten(1), torch.tensor(X))
