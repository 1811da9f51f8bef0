"""A run that nobody interrupted, for comparison."""

import pytest
import runs


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    runs.finish(folder)
    return folder
