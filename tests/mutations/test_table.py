"""The table of planted bugs fits the code and the documentation; `make mutations` runs it."""

from pathlib import Path

import pytest

from mutations.table import MUTATIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_right_code_is_where_the_table_says(mutation):
    text = (ROOT / "dpsgd" / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.before) == 1
    file, _, test = mutation.test.partition("::")
    assert (ROOT / file).exists()
    assert f"def {test.partition('[')[0]}" in (ROOT / file).read_text(encoding="utf-8")


def test_the_documentation_lists_every_planted_bug():
    page = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    rows = [f"| {m.name} | `{m.test.split('::')[-1].partition('[')[0]}` |" for m in MUTATIONS]
    missing = [row for row in rows if row not in page]
    assert not missing, "\n".join(missing)
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 16
