"""The report as a page: complete, true when rounded, safe to hand on, readable without markup."""

import copy
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import pytest

from dpsgd.report_html import _most_found, _odds, _share, _up, html_report

CONFIG = "model:\n  name: <script>alert(1)</script> & more\n"
REPORT = {
    "private": True,
    "not_private_because": [],
    "epsilon": 2.998280577670019,
    "delta": 1e-05,
    "adjacency": "add_remove",
    "unit": "record",
    "accountant": "pld",
    "epsilon_by_accountant": {"pld": 2.998280577670019, "rdp": 3.2481890099888613},
    "mu": 0.7188041873338438,
    "true_positive_rates": {"0.001": 0.0088589, "0.01": 0.0539648, "0.1": 0.2867869},
    "noise_multiplier": 7.620442756644287,
    "noise_schedule": {"0": 1.0},
    "clipping": "Flat",
    "clipping_guarantee": "each sample's gradient is shrunk to L2 norm C at most",
    "max_grad_norm": 1.25,
    "sampling": {"sampler": "poisson", "sample_rate": 0.25},
    "sample_rate": 0.25,
    "expected_batch_size": 359.25,
    "public_size": 1437,
    "steps": 30,
    "charged_steps": 30,
    "steps_timed": 30,
    "attempts": [{"first_step": 0, "charged_steps": 30}],
    "planned_steps": 30,
    "interrupted": False,
    "test": {"test_loss": 0.2622465592828759, "test_accuracy": 0.9222222222222223},
    "history": [
        {"step": 10, "epsilon": 1.61967, "test_loss": 0.76627, "test_accuracy": 0.86944},
        {"step": 20, "epsilon": 2.3848, "test_loss": 0.30869, "test_accuracy": 0.90833},
        {"step": 30, "epsilon": 2.99828, "test_loss": 0.26225, "test_accuracy": 0.92222},
    ],
    "epsilon_curve": {"steps": [0, 10, 20, 30], "epsilons": [0.0, 1.6197, 2.3848, 2.99828]},
    "engine": "Ghost",
    "routes": {"features.0.weight": "convolution", "head.weight": "linear", "head.bias": "linear"},
    "parameters": 10666,
    "device": "cpu",
    "processes": 2,
    "seconds": 5.719,
    "versions": {"python": "3.11.7", "dpsgd": "0.1.0", "torch": "2.13.0", "opacus": "1.6.0"},
}


def changed(**changes):
    return {**copy.deepcopy(REPORT), **changes}


class Reader(HTMLParser):
    """What a reader without markup gets; insists that elements are closed in order."""

    VOID = ("meta", "br")

    def __init__(self):
        super().__init__()
        self.open, self.words, self.headings, self.ids = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and self.open[-2:] != ["head", "title"]:
            self.words += data.split()


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def text(report, config=CONFIG):
    return " ".join(read(html_report(report, config)).words)


def in_order(words, *parts):
    places = [words.index(part) for part in parts]
    assert places == sorted(places)


def test_every_figure_is_there():
    words = text(REPORT)
    for part in [
        "epsilon at most 3.00", "at delta 1e-05", "one record", "adding or removing one record",
        "1 in 100,000", "factor of 20.1", "mu at most 0.719", "PLD 2.998281, RDP 3.248190",
        "falsely accuses 1 in 1,000 finds at most 0.89%", "1 in 100 finds at most 5.4%",
        "1 in 10 finds at most 28.7%", "noise multiplier 7.620443", "Flat: each sample's gradient",
        "C = 1.25", "Sample rate 0.25", "expected batch size 359.25", "1,437 records",
        "30 taken, 30 charged, 30 planned", "test loss 0.2622, test accuracy 92.2%", "Ghost",
        "10,666 weights in 3 parameters", "linear 2 head.weight, head.bias",
        "cpu in 2 processes, 5.719 seconds",
        "python 3.11.7", "torch 2.13.0", "20 2.3848 90.8% 0.3087", "Poisson:", "trusted curator",
        "Not accounted",
    ]:  # fmt: skip
        assert part in words


def test_text_without_markup_reads_in_order():
    words = text(REPORT)
    in_order(
        words, "Privacy report of a training run", "The guarantee", "In plain words",
        "What an attacker can find out", "Not covered", "Budget and results",
        "How it comes about", "Software and settings", "model: name:", "What is reported",
    )  # fmt: skip


def test_the_words_of_a_picture_are_introduced_and_in_one_line():
    page = html_report(REPORT, CONFIG)
    assert "Epsilon against training steps; on its axes: 0 10 20 30 steps 0 1" in text(REPORT)
    assert all("\n" not in picture for picture in re.findall(r"<svg.*?</svg>", page, flags=re.S))


def test_there_is_a_sentence_to_quote_if_there_is_a_guarantee():
    quote = (
        "(epsilon, delta)-differentially private with epsilon 3.00 and delta 1e-05 "
        "for adding or removing one record (add_remove)."
    )
    assert quote in text(REPORT)
    assert "To quote" not in text(changed(private=False, not_private_because=["A fixed key."]))


def test_epsilon_of_the_charged_steps_is_there_as_a_table():
    assert "charged steps epsilon 0 0 10 1.6197 20 2.3848 30 2.9983" in text(REPORT)
    interrupted = changed(interrupted=True, steps=12, charged_steps=13, epsilon=1.8)
    assert "charged steps epsilon 0 0 10 1.6197 13 1.8000 Results" in text(interrupted)


@pytest.mark.parametrize("epsilon", [701.0, 303303.66])
def test_a_bound_that_no_float_holds_is_not_made_up(epsilon):
    words = text(changed(epsilon=epsilon))
    assert "e to the power of epsilon, which is no limit in effect" in words
    assert "e+30" not in words


def test_an_infinite_epsilon_is_said_and_not_drawn():
    page = html_report(changed(epsilon=math.inf, mu=math.inf), CONFIG)
    assert "epsilon at most infinite" in " ".join(read(page).words)
    assert "there is no guarantee" in page
    assert page.count("<svg") == 1


def test_a_clipping_schedule_gives_the_norms_in_order():
    words = text(changed(clipping_schedule={"0": 1.0, "20": 0.2, "10": 0.5}))
    assert "C = 1.25 from the start, 0.625 after 10 steps, 0.25 after 20 steps." in words
    assert "C = 1.25." in text(changed(clipping_schedule={"0": 1.0}))
    assert "C = 1.25, times the factors of clipping.schedule where" in text(REPORT)


def test_headings_descend_one_level_at_a_time():
    levels = read(html_report(REPORT, CONFIG)).headings
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_what_is_not_covered_is_said():
    words = text(REPORT)
    for part in [
        "test set", "Choosing among several runs", "private/", "side channels",
        "Floating-point rounding", "Initial weights",
    ]:  # fmt: skip
        assert part in words[words.index("Not covered") :]


def test_a_private_run_has_no_banner():
    assert "NOT PRIVATE" not in html_report(REPORT, CONFIG)


def test_a_run_that_is_not_private_says_so_first_and_claims_nothing():
    reasons = ["privacy.key is fixed.", "diagnostics <were> released."]
    report = changed(private=False, not_private_because=reasons)
    words = text(report)
    assert words.startswith("NOT PRIVATE")
    assert "epsilon would be 3.00" in words
    assert "epsilon at most" not in words
    in_order(words, *reasons, "Privacy report", "No guarantee", "None: the run is not private")
    assert "The guarantee" not in words
    assert "<title>NOT PRIVATE" in html_report(report, CONFIG)


def test_nothing_from_outside_and_no_script():
    page = html_report(REPORT, "a: b\n")
    assert not re.search(r"https?:|@import|<script|<link|<img|\bon\w+=", page)
    assert all(link.startswith('"#') for link in re.findall(r'(?:src|href)=("[^"]*)', page))
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", page))


def test_what_people_wrote_is_escaped():
    name = "<b>&'\""
    report = changed(routes={name: name}, device=name, engine=name, versions={"dpsgd": name})
    page = html_report(report, CONFIG)
    assert "<script" not in page
    assert "<b>&'" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert text(report).count(name) == 6  # a route, its parameter, device, engine, version twice


def test_the_same_report_gives_the_same_bytes_whatever_the_style(monkeypatch):
    page = html_report(REPORT, CONFIG)
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9)
    assert html_report(copy.deepcopy(REPORT), CONFIG) == page
    assert matplotlib.rcParams["font.size"] == 30


def test_pictures_are_sound_and_named_and_take_colours_from_the_page():
    page = html_report(REPORT, CONFIG)
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(pictures) == 2
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
        assert "var(--accent)" in picture
        assert not re.search(r"#0[1-4]0[1-4]0[1-4]", picture)
    ids = read(page).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)


def test_a_run_without_a_test_set_claims_no_utility():
    page = html_report(changed(history=[], test={}), CONFIG)
    assert "no utility is claimed" in page
    assert page.count("<svg") == 1
    assert "Results by step" not in page


def test_loss_is_drawn_where_there_is_no_accuracy():
    history = [{"step": 10, "epsilon": 1.6, "test_loss": 2.5}]
    page = html_report(changed(history=history, test={"test_loss": 2.5}), CONFIG)
    assert 'aria-label="Test loss against epsilon"' in page
    assert "accuracy" not in page


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_said_and_not_drawn(loss):
    history = [{"step": 10, "epsilon": 1.6, "test_loss": loss}]
    page = html_report(changed(history=history, test={"test_loss": loss}), CONFIG)
    assert f"test loss {loss}" in page
    assert "not finite" in page
    assert page.count("<svg") == 1


def test_an_interrupted_run_charges_what_it_started():
    words = text(changed(interrupted=True, steps=12, charged_steps=13, epsilon=1.8))
    assert "interrupted after 12 of 30 steps" in words
    assert "12 taken, 13 charged, 30 planned; interrupted" in words
    assert "did not finish counts in full" in words
    assert "the dotted curve what the plan had left" in words


def test_a_run_interrupted_before_its_first_step():
    nothing = {"0.001": 0.001, "0.01": 0.01, "0.1": 0.1}
    words = text(
        changed(
            interrupted=True,
            steps=0,
            charged_steps=0,
            epsilon=0.0,
            mu=0.0,
            history=[],
            test={},
            true_positive_rates=nothing,
            epsilon_by_accountant={"pld": 0.0, "rdp": 0.0},
        )
    )
    assert "epsilon at most 0 at delta" in words
    assert "1 in 100 finds at most 1%" in words


def test_replace_one_with_one_accountant_and_a_public_size():
    words = text(
        changed(
            adjacency="replace_one",
            epsilon_by_accountant={"pld": 2.99},
            sampling={"sampler": "shuffled", "batch_size": 360, "public_size": 1437},
        )
    )
    assert "replacing one record by another in the training data" in words
    assert "no second accountant is proven" in words
    assert "in batches of 360" in words
    assert "needs the declaration to be true" in words
    assert "call an epsilon up to 1 strong" not in words


def test_a_user_is_the_unit_everywhere():
    sampling = {"sampler": "user_poisson", "sample_rate": 0.25, "records_per_user": 4}
    words = text(changed(unit="user", sampling=sampling))
    assert "adding or removing one user with all of its records" in words
    assert "up to 4 of its records" in words
    assert "1,437 users" in words
    assert "one record" not in words


def test_truncated_poisson_says_its_largest_batch():
    sampling = {"sampler": "truncated_poisson", "max_batch_size": 512, "public_size": 1437}
    assert "of a larger draw, 512 records" in text(changed(sampling=sampling))


def test_a_noise_schedule_gives_the_multipliers_in_order():
    schedule = {"0": 1.0, "20": 0.25, "10": 0.5}
    words = text(changed(noise_multiplier=4.0, noise_schedule=schedule))
    assert "noise multiplier 4 from the start, 2 after 10 steps, 1 after 20 steps" in words


def test_three_hundred_parameters_are_grouped_by_route():
    routes = {f"blocks.{i}.weight": ("linear", "embedding", "linear")[i % 3] for i in range(300)}
    words = text(changed(routes=routes))
    assert "in 300 parameters" in words
    in_order(words, "linear 200 blocks.0.weight", "embedding 100 blocks.1.weight")
    assert "blocks.299.weight" in words


@pytest.mark.parametrize(
    ("sweep", "parts"),
    [
        ({"epsilon": 8.5, "runs": 7}, ["among 7 runs", "Accounted: 7 runs, epsilon 8.500000"]),
        (
            {"epsilon": 5.0, "delta": 1e-6, "mean_runs": 10, "accounting": "random stopping"},
            ["a random number of runs", "with mean 10", "by random stopping", "at delta 1e-06"],
        ),
    ],
)
def test_a_run_of_a_sweep_claims_what_the_sweep_spent(sweep, parts):
    words = text(changed(sweep=sweep))
    assert f"epsilon at most {sweep['epsilon']:.2f}" in words
    assert "run taken alone spent epsilon 3.00" in words
    assert "5.4%" not in words  # the power of an attack on a single run
    assert "Not accounted" not in words
    for part in parts:
        assert part in words


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (2.9982, "3.00"), (3.0, "3.00"), (3.0001, "3.01"), (9.996, "10.0"),
        (0.01231, "0.0124"), (9164.2, "9,170"), (170, "170"), (1e30, "1.00e+30"),
        (math.inf, "infinite"),
    ],
)  # fmt: skip
def test_bounds_are_rounded_up(value, shown):
    assert _up(value) == shown


@pytest.mark.parametrize(
    ("bound", "shown"),
    [(0.0088589, "0.89%"), (0.0539, "5.4%"), (0.05391, "5.4%"), (0.1, "10%"), (0.9999, "100%")],
)
def test_shares_are_rounded_up(bound, shown):
    assert _share(bound) == shown


@pytest.mark.parametrize(
    ("delta", "shown"),
    [(1e-5, "1 in 100,000"), (3e-6, "1 in 333,333"), (0, "0"), (2, "1 in 1")],
)
def test_delta_in_words_is_no_smaller_than_it_is(delta, shown):
    assert _odds(delta) == shown


def test_the_power_of_an_attack_follows_from_epsilon_and_delta():
    assert _most_found(0.1, 0.0, 0.0) == pytest.approx(0.1)
    assert _most_found(0.01, 1.0, 1e-5) == pytest.approx(0.01 * math.e + 1e-5)
    assert _most_found(0.1, 3.0, 0.0) == pytest.approx(1 - 0.9 / math.exp(3))
    assert _most_found(0.1, 5000.0, 0.0) == pytest.approx(1.0)
