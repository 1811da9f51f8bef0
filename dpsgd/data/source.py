"""Tables of local files and of the Hugging Face hub, by the `datasets` library."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from dpsgd.data.columns import Table

_FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
}
_SAVED = "state.json", "dataset_dict.json"  # written by `save_to_disk`


@dataclass(frozen=True)
class Source:
    """Where the tables of the splits come from.

    Attributes:
        path: A file, a folder of files or one made by `save_to_disk`, or a name on the hub. Of a
            .txt file each line is a row of its column `text`.
        subset: Name of the configuration on the hub, where there are several.
        train_split: Name of the split to train on; one file is one such split.
        test_split: Name of the split to test on; None without a test set.
        test_path: The test set beside a single training file, in the same format.

    Raises:
        ValueError: If there is a test_path that does not go with the path.
    """

    path: str
    subset: str | None
    train_split: str
    test_split: str | None
    test_path: str | None

    def __post_init__(self) -> None:
        if self.test_path is None:
            return
        if not Path(self.path).is_file() or not Path(self.test_path).is_file():
            raise ValueError(
                f"Expected test_path to be a file beside a single training file, got "
                f"{self.test_path} and {self.path}. Set test_split for folders and hub names."
            )
        if Path(self.path).suffix != Path(self.test_path).suffix:
            raise ValueError(
                f"Expected training and test file in one format, got {self.path} and "
                f"{self.test_path}."
            )

    @property
    def test_name(self) -> str | None:
        """Name of the test split; that of a test file is `test` unless given."""
        return self.test_split or (None if self.test_path is None else "test")

    def load(self, datasets: ModuleType, scratch: str) -> Mapping[str, Table]:
        """Returns the tables by name of their split; local files are unpacked into `scratch`.

        Raises:
            ValueError: If they cannot be read.
        """
        try:
            return self._load(datasets, scratch)
        except datasets.exceptions.DatasetGenerationError as error:  # its cause may quote a record
            raise ValueError(
                f"Expected readable records in '{self.path}', got {_trouble(error)}."
            ) from error
        except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"Expected data at '{self.path}', a local file or folder or a name on the Hugging "
                f"Face hub, got: {error}"
            ) from error

    def _load(self, datasets: ModuleType, scratch: str) -> Mapping[str, Table]:
        path = Path(self.path)
        if path.is_dir() and any((path / name).exists() for name in _SAVED):
            saved = datasets.load_from_disk(self.path)
            return saved if isinstance(saved, Mapping) else {self.train_split: saved}
        if path.is_dir():
            return datasets.load_dataset(self.path, name=self.subset, cache_dir=scratch)
        if path.suffix in _FORMATS:
            files = {self.train_split: self.path}
            if self.test_path is not None and self.test_name is not None:
                files[self.test_name] = self.test_path
            return datasets.load_dataset(_FORMATS[path.suffix], data_files=files, cache_dir=scratch)
        if path.is_file():
            raise ValueError(f"a file that does not end in {', '.join(_FORMATS)}.")
        return datasets.load_dataset(self.path, name=self.subset)

    def pick(self, tables: Mapping[str, Table], name: str) -> Table:
        """Returns the table of a split.

        Raises:
            ValueError: If there is none of that name.
        """
        if name not in tables:
            raise ValueError(
                f"Expected a split '{name}' in '{self.path}', got {', '.join(tables)}. Set "
                "train_split and test_split to two of these, test_split to null for none, or "
                "test_path to a test file beside a single training file."
            )
        return tables[name]


def library() -> ModuleType:
    """Returns the `datasets` library, quiet.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "Expected the datasets library, got an environment without it. "
            "Install it with: pip install 'dpsgd[hf]'."
        ) from error
    datasets.disable_progress_bars()  # they tell how many records there are
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _trouble(error: BaseException) -> str:
    """What is wrong with a file, in words that quote nothing of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UnicodeDecodeError):
            return "a file that is not UTF-8: convert it with iconv"
        cause = cause.__cause__ or cause.__context__
    return "a file that is empty, or not of the kind that its name ends in"
