"""Links into the repository work on the documentation site."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
PATH = ROOT / "docs" / "hooks" / "repository.py"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/*/*.md")]


@pytest.fixture(scope="module")
def rewritten():
    spec = importlib.util.spec_from_file_location("repository", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda text, uri="memory.md": module.on_page_markdown(
        text, SimpleNamespace(file=SimpleNamespace(src_uri=uri)), None, None
    )


@pytest.mark.parametrize(
    ("uri", "link", "expected"),
    [
        ("memory.md", "privacy.md#samplers", "privacy.md#samplers"),
        ("memory.md", "../README.md", "index.md"),
        ("memory.md", "../experiments/lm/README.md", "studies/lm/README.md"),
        ("extending/rule.md", "../engines.md", "../engines.md"),
        (
            "extending/rule.md",
            "../../experiments/lm/perplexity.png",
            "../studies/lm/perplexity.png",
        ),
        ("studies/scaling/README.md", "../../docs/scaling.md", "../../scaling.md"),
        ("studies/scaling/README.md", "scaling.png", "scaling.png"),
        ("contributing.md", "docs/engines.md", "engines.md"),
        ("memory.md", "https://pytorch.org", "https://pytorch.org"),
    ],
)
def test_a_link_follows(rewritten, uri, link, expected):
    assert rewritten(f"see [this]({link}).", uri) == f"see [this]({expected})."


def test_what_stays_behind_becomes_its_text(rewritten):
    assert rewritten("see [the program](../experiments/lm/run.py).") == "see the program."


def test_a_link_to_nothing_is_an_error(rewritten):
    with pytest.raises(Exception, match="not in the repository"):
        rewritten("see [this](../nothing.md).")


def test_code_is_left_alone(rewritten):
    code = "```python\ngrads = engines[name](../nothing.md)\n```"
    assert rewritten(code) == code


def test_no_page_has_words_that_browsers_take_for_tags():
    """<g_i, v> outside of code vanishes from the site."""
    for page in PAGES:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
        assert not re.findall(r"<[a-z]+_[^>\n]*>", text), page
