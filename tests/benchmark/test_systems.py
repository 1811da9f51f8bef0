import pytest

from dpsgd.benchmark.systems import expand, label

VARIANTS = {"opacus": [{"mode": "hooks"}, {"mode": "ghost"}]}


def test_a_bare_name_stands_for_its_variants():
    assert expand(["vmap", "opacus"], VARIANTS) == [
        ("vmap", {}),
        ("opacus", {"mode": "hooks"}),
        ("opacus", {"mode": "ghost"}),
    ]


def test_a_name_with_options_stands_for_itself():
    assert expand([{"opacus": {"mode": "ew"}}], VARIANTS) == [("opacus", {"mode": "ew"})]


@pytest.mark.parametrize("entries", [[], [3], [{}], [{"a": {}, "b": {}}], [{"opacus": "ghost"}]])
def test_other_entries_are_refused(entries):
    with pytest.raises(ValueError, match="Expected"):
        expand(entries, VARIANTS)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "vmap"),
        ({"mode": "ghost"}, "vmap-ghost"),
        ({"compile": True}, "vmap-compile"),
        ({"chunk_size": 16, "compile": False}, "vmap-chunk_size=16-compile=False"),
    ],
)
def test_names_tell_the_options(options, name):
    assert label("vmap", options) == name
