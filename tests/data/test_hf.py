"""Local files and folders through the `datasets` library; nothing here touches the network."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from dpsgd.data import huggingface

datasets = pytest.importorskip("datasets")

TABLE = {
    "a": [0.5, 1.5, 2.5, 3.5],
    "b": [1, 2, 3, 4],
    "ids": [[1, 2, 3], [4, 5, 6], [7, 8, 0], [1, 1, 1]],
    "ragged": [[1], [2, 3], [4], [5]],
    "text": ["to", "be", "or", "not"],
    "label": [0, 1, 1, 0],
}
WRITERS = {
    ".parquet": lambda table, path: table.to_parquet(path),
    ".csv": lambda table, path: table.select_columns(["a", "b", "text", "label"]).to_csv(path),
    ".jsonl": lambda table, path: table.to_json(path),
    ".arrow": lambda table, path: write_arrow(table, path),
}


def write_arrow(table, path):
    with datasets.arrow_writer.ArrowWriter(path=path, features=table.features) as writer:
        writer.write_table(table.data.table)
        writer.finalize()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache of its own, and no network."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield cache
    datasets.enable_progress_bars()


@pytest.fixture
def write(tmp_path):
    def write(name="data.parquet", table=TABLE, features=None):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        WRITERS[path.suffix](datasets.Dataset.from_dict(table, features=features), str(path))
        return path

    return write


def read(path, **changes):
    arguments = {
        "input_column": ["a", "b"],
        "label_column": "label",
        "input_shape": [2],
        "num_classes": 2,
        "public_size": 10,
    }
    return huggingface(path, **{**arguments, **changes})


@pytest.mark.parametrize("suffix", WRITERS)
def test_numeric_columns_of_every_format(write, suffix):
    x, y = read(write(f"data{suffix}")).train
    assert x.tolist() == [[0.5, 1], [1.5, 2], [2.5, 3], [3.5, 4]]
    assert y.tolist() == TABLE["label"]


def test_one_column_of_numbers(write):
    assert read(write(), input_column="a", input_shape=[1]).train[0].shape == (4, 1)


def test_a_column_of_token_ids(write):
    data = read(write(), input_column="ids", input_shape=[3], vocab_size=9)
    assert data.train[0].tolist() == TABLE["ids"]


def test_a_column_of_lists_is_reshaped(write):
    x, _ = read(write(), input_column="ids", input_shape=[3, 1]).train
    assert (x.shape, x.dtype) == ((4, 3, 1), torch.float32)


def test_regression(write):
    data = read(write(), input_column="b", label_column="a", input_shape=[1], num_classes=None)
    assert data.train[1].tolist() == TABLE["a"]


def test_a_file_alone_has_no_test_set(write):
    assert read(write()).test is None


def test_a_test_file_beside_the_training_file(write):
    test = write("test.parquet", {"a": [9.0], "b": [8], "label": [1]})
    train = write("train.parquet", {"a": [0.0, 1.0], "b": [8, 9], "label": [1, 0]})
    data = read(train, test_path=test)
    assert len(data) == 2
    assert data.test[0].tolist() == [[9, 8]]


def test_a_folder_of_files(write):
    folder = write("folder/train.csv").parent
    write("folder/test.csv", {**TABLE, "a": [7.0] * 4})
    data = read(folder, test_split="test")
    assert data.train[0][:, 0].tolist() == TABLE["a"]
    assert data.test[0][:, 0].tolist() == [7.0] * 4


def test_a_saved_table(tmp_path):
    datasets.Dataset.from_dict(TABLE).save_to_disk(tmp_path / "saved")
    assert len(read(tmp_path / "saved")) == 4


def test_saved_splits(tmp_path):
    table = datasets.Dataset.from_dict(TABLE)
    splits = datasets.DatasetDict({"train": table, "held_out": table.select([0])})
    splits.save_to_disk(tmp_path / "saved")
    assert len(read(tmp_path / "saved", test_split="held_out").test[0]) == 1


def test_local_records_leave_no_copy_in_the_cache(write, cache):
    read(write())
    assert not list(cache.rglob("*.arrow"))


def images(mode_shape, count=3):
    pixels = np.random.default_rng(0).integers(0, 256, (count, *mode_shape), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return pixels, {"table": {"image": list(pixels), "label": [0] * count}, "features": features}


def test_color_images_have_channels_first(write):
    pixels, arguments = images((4, 5, 3))
    x, _ = read(write(**arguments), input_column="image", input_shape=[3, 4, 5]).train
    expected = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("shape", [[1, 4, 5], [4, 5]])
def test_gray_images(write, shape):
    pixels, arguments = images((4, 5))
    x, _ = read(write(**arguments), input_column="image", input_shape=shape).train
    torch.testing.assert_close(x, torch.tensor(pixels).view(3, *shape).float() / 255)


def test_images_get_the_declared_channels(write):
    _, arguments = images((4, 5))
    x, _ = read(write(**arguments), input_column="image", input_shape=[3, 4, 5]).train
    assert torch.equal(x[:, 0], x[:, 2])


def test_images_are_never_resized(write):
    _, arguments = images((4, 5, 3))
    with pytest.raises(ValueError, match="height 5 and width 4"):
        read(write(**arguments), input_column="image", input_shape=[3, 5, 4])


def test_images_of_sixteen_bits_are_refused(write):
    pixels = np.zeros((4, 5), dtype=np.uint16)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    path = write(table={"image": [pixels], "label": [0]}, features=features)
    with pytest.raises(ValueError, match="Expected 8-bit images"):
        read(path, input_column="image", input_shape=[1, 4, 5])


def test_normalisation_per_channel(write):
    pixels, arguments = images((4, 5, 3))
    mean, std = [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]
    x, _ = read(
        write(**arguments), input_column="image", input_shape=[3, 4, 5], mean=mean, std=std
    ).train
    expected = (torch.tensor(pixels).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(x, expected.permute(0, 3, 1, 2))


def test_normalisation_by_one_number(write):
    x, _ = read(write(), mean=1, std=2.0).train
    assert x[0].tolist() == [-0.25, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "labels"}, "Expected a column 'labels', got a, b"),
        ({"input_column": "text"}, "Tokenise text"),
        ({"input_column": "ragged"}, "pad lists"),
        ({"label_column": "text"}, "number labels"),
        ({"input_shape": [3]}, "3 values each"),
        ({"num_classes": 1}, r"labels within 0\.\.0"),
        ({"test_split": "test"}, "Expected a split 'test' in .*, got train"),
        ({"mean": [1.0]}, "Expected mean to be one number or 2"),
        ({"std": 0.0}, "std > 0"),
        ({"vocab_size": 9, "mean": 1.0}, "Leave them out for token ids"),
    ],
)
def test_what_does_not_fit(write, changes, message):
    with pytest.raises(ValueError, match=message):
        read(write(), **changes)


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match="Expected data at"):
        read(tmp_path / "nowhere.parquet")


def test_an_unknown_format(tmp_path):
    path = tmp_path / "data.xlsx"
    path.touch()
    with pytest.raises(ValueError, match=r"does not end in \.parquet"):
        read(path)


def test_a_damaged_file(tmp_path):
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="Expected data at"):
        read(path)


def test_a_hub_name_offline():
    with pytest.raises(ValueError, match="Expected data at 'nobody/nothing'"):
        read("nobody/nothing")


def test_a_test_file_needs_a_training_file(write):
    path = write("folder/train.parquet")
    with pytest.raises(ValueError, match="Set test_split for folders"):
        read(path.parent, test_path=path)


def test_two_files_of_one_format(write):
    with pytest.raises(ValueError, match="in one format"):
        read(write(), test_path=write("test.csv"))


def test_without_the_library(monkeypatch, write):
    path = write()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'dpsgd\[hf\]'"):
        read(path)
