"""report.html: everything that has to be said, nothing loaded, nothing executed."""

import re
from html.parser import HTMLParser

import pytest

from dpsgd.report_html import html_report

REPORT = {
    "private": True,
    "not_private_because": [],
    "epsilon": 2.34567,
    "delta": 1e-6,
    "adjacency": "add_remove",
    "unit": "record",
    "accountant": "pld",
    "epsilon_by_accountant": {"pld": 2.34567, "rdp": 2.56789},
    "mu": 0.61234,
    "true_positive_rates": {"0.001": 0.0071, "0.01": 0.0461, "0.1": 0.2612},
    "noise_multiplier": 4.3219,
    "noise_schedule": {"0": 1.0},
    "clipping": "Flat",
    "clipping_guarantee": "each sample's gradient is shrunk to L2 norm C at most",
    "max_grad_norm": 0.75,
    "sampling": {"sampler": "poisson", "sample_rate": 0.123},
    "sample_rate": 0.123,
    "expected_batch_size": 246.0,
    "public_size": 2000,
    "steps": 37,
    "charged_steps": 38,
    "planned_steps": 40,
    "interrupted": True,
    "test": {"test_loss": 0.4321, "test_accuracy": 0.8768},
    "history": [
        {"step": 10, "epsilon": 1.1, "test_loss": 0.9, "test_accuracy": 0.6},
        {"step": 37, "epsilon": 2.3, "test_loss": 0.4321, "test_accuracy": 0.8768},
    ],
    "epsilon_curve": {"steps": [0, 20, 40], "epsilons": [0.0, 1.6, 2.4]},
    "engine": "Ghost",
    "routes": {"0.weight": "convolution", "2.weight": "linear", "2.bias": "linear"},
    "parameters": 12345,
    "device": "cpu",
    "seconds": 6.5,
    "versions": {"python": "3.11.7", "torch": "2.13.0", "dp-accounting": "0.6.0"},
}
CONFIG = "engine:\n  _target_: dpsgd.engines.Ghost\nnote: <script>alert('a & b')</script>\n"


class Text(HTMLParser):
    """The page as somebody reads it without a browser; and what it would load."""

    def __init__(self, page):
        super().__init__()
        self.words, self.loaded, self.tags, self._skipped = [], [], [], 0
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._skipped += tag in ("style", "svg")
        self.loaded += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v[:1] != "#"]

    def handle_endtag(self, tag):
        self._skipped -= tag in ("style", "svg")

    def handle_data(self, data):
        if not self._skipped:
            self.words.append(data)


def page(**changes):
    return Text(html_report({**REPORT, **changes}, CONFIG))


@pytest.mark.parametrize(
    "words",
    [
        "2.346", "1e-06", "87.7 %", "Adding or removing one record", "1 in 1,000", "0.71 %",
        "4.61 %", "26.12 %", "mu = 0.612", "4.3219", "Flat, C = 0.75", "shrunk to L2 norm C",
        "rate 0.123", "expected batch 246 of 2000 declared records",
        "37 taken, 38 charged, 40 planned; interrupted", "PLD (dp-accounting), epsilon 2.3457",
        "cross-check by RDP: 2.5679", "Ghost on cpu, 12,345 parameters", "6.5 seconds", "2.13.0",
        "0.6.0", "convolution 1, linear 2", "2.bias", "dpsgd.engines.Ghost", "Not covered",
        "not accounted for", "ledger.jsonl", "test set",
    ],
)  # fmt: skip
def test_what_has_to_be_said_is_said(words):
    assert words in page().text


def test_nothing_is_loaded_or_executed():
    read = page()
    assert read.loaded == []
    assert "script" not in read.tags
    source = html_report(REPORT, CONFIG)
    assert "@import" not in source
    assert "url(" not in re.sub(r"url\(#\w+\)", "", source)
    assert "<script>alert" not in source
    assert "<script>alert('a & b')</script>" in read.text


def test_the_same_report_gives_the_same_bytes():
    assert html_report(REPORT, CONFIG) == html_report(REPORT, CONFIG)


def test_a_banner_comes_first_where_nothing_is_private():
    assert "NOT PRIVATE" not in page().text
    read = page(private=False, not_private_because=["privacy.key is fixed <b>."])
    assert read.text.index("NOT PRIVATE") < read.text.index("Privacy report")
    assert "privacy.key is fixed <b>." in read.text
    assert "They are not kept." in read.text
    assert "that was destroyed" not in read.text


def test_headings_come_in_order_and_pictures_have_words():
    read = page()
    assert next(tag for tag in read.tags if tag in ("h1", "h2", "h3")) == "h1"
    source = html_report(REPORT, CONFIG)
    assert source.count("<svg role=") == source.count("aria-label=") == 2
    assert 'lang="en"' in source
    assert "prefers-color-scheme: dark" in source


def test_a_sweep_has_the_guarantee_of_the_whole():
    read = page(sweep={"epsilon": 5.4321, "delta": 1e-6, "runs": 9, "accounting": "composition"})
    assert read.text.index("5.432") < read.text.index("2.346")
    assert "accounted for: composition" in read.text
    assert "choosing this run" not in read.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"history": [], "test": {}}, "no accuracy is claimed"),
        ({"history": [{"step": 1, "epsilon": 1.0, "test_loss": 0.5}], "test": {"test_loss": 0.5}},
         "0.5000"),
        ({"adjacency": "replace_one"}, "Replacing one record by another"),
        ({"unit": "user", "sampling": {"sampler": "user_poisson", "sample_rate": 0.1,
                                       "records_per_user": 4}}, "up to 4 records of each"),
        ({"sampling": {"sampler": "truncated_poisson", "sample_rate": 0.1, "max_batch_size": 300,
                       "public_size": 2000}}, "at most 300"),
        ({"sampling": {"sampler": "shuffled", "batch_size": 9, "public_size": 9}},
         "no amplification"),
        ({"sampling": {"sampler": "mine"}}, "records"),
        ({"noise_schedule": {"0": 1.2, "30": 0.9}}, "1.2 from step 0 on, 0.9 from step 30 on"),
        ({"epsilon_by_accountant": {"pld": 2.34567}}, "epsilon 2.3457"),
        ({"routes": {f"layer.{i}": "linear" for i in range(300)}}, "layer.299"),
        ({"epsilon": 0.0, "charged_steps": 0, "steps": 0, "mu": 0.0}, "0 taken, 0 charged"),
    ],
)  # fmt: skip
def test_other_runs_have_their_words(changes, words):
    assert words in page(**changes).text
