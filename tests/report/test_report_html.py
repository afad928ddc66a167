"""The report as a reader gets it: complete, self-contained, safe with any text, the same every time."""

import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from making.evidence import cross_fitted, make_evidence, make_history, make_items, with_scores
from making.property_examples import examples
from tunewright.config import Metric
from tunewright.core.io import digest
from tunewright.evidence.schema import Item
from tunewright.evidence.verdict import verdict
from tunewright.report.items import SHOWN_FIXED, SHOWN_STILL_WRONG
from tunewright.report.page import render_report, summary

ITEMS = make_items(60)
EVIDENCE = make_evidence(ITEMS, also=["bleu"])
VOID = {"meta", "br", "link", "img", "input", "hr"}


class _Reader(HTMLParser):
    """Collects tags, attributes and visible text, and checks that every element is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


@cache
def _page() -> str:
    """Return the report, rendered when the first test reads it."""
    return render_report(EVIDENCE, ITEMS, make_history())


@cache
def _read() -> _Reader:
    return _Reader(_page())


def test_report_begins_with_the_verdict_and_its_reasons() -> None:
    result = verdict(EVIDENCE)
    made = "Measured on 2026-11-02, with the base smollm2-135m-instruct, on data set court-citations (version "
    texts = (
        f"{summary(EVIDENCE).answer} {result.summary} {made}",
        *result.reasons,
        "Arms on the test split",
        "Lineage",
    )
    places = [_read().text.index(text) for text in texts]
    assert places == sorted(places)


def test_report_shows_a_long_list_of_the_lineage_by_its_digest() -> None:
    keys = [digest(str(number)) for number in range(300)]
    page = render_report(EVIDENCE.model_copy(update={"lineage": {"preferences": {"rows": keys}}}), ITEMS, [])
    assert f"300 values, SHA-256 {digest(keys)[:12]}" in page and keys[0] not in page


def test_report_fetches_nothing_and_runs_no_script() -> None:
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(_read().tags)
    for name, value in _read().attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#")
    assert "default-src 'none'" in _page()
    assert not re.search(r"@import|url\((?!#)", _page())


def test_ids_are_unique_and_references_point_somewhere() -> None:
    ids = [value for name, value in _read().attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", _page())) | {v[1:] for n, v in _read().attributes if n == "xlink:href"}
    assert used
    assert used <= set(ids)


@pytest.mark.parametrize("field", ["input", "reference", "treatment", "control", "name", "lineage"])
def test_report_escapes_users_text(field: str) -> None:
    attack = '<script>alert(1)</script><img src=x onerror=alert(1)> & {{ 7*7 }} "quoted" </title></style>'
    (item,) = with_scores([ITEMS[0].model_copy(update={"answers": dict.fromkeys(ITEMS[0].answers, "wrong")})])
    evidence = EVIDENCE
    if field in ("input", "reference"):
        item = item.model_copy(update={field: attack})
    elif field in ("treatment", "control"):
        name = getattr(EVIDENCE.contrasts[0], field)
        item = item.model_copy(update={"answers": item.answers | {name: attack}})
    elif field == "name":
        evidence = evidence.model_copy(update={"project": attack})
    else:
        evidence = evidence.model_copy(update={"lineage": {"base": {attack: attack}}})
    read = _Reader(render_report(evidence, [item], []))
    assert not {"script", "img"} & set(read.tags)
    assert "<script>alert(1)</script><img src=x onerror=alert(1)> & {{ 7*7 }}" in read.text


@examples(25)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=4, max_size=4))
def test_report_is_well_formed_for_any_text(texts: list[str]) -> None:
    answers = {"zero-shot": texts[0], "retrieved-4": texts[1], "tuned": texts[2]}
    item = Item(key="k", cluster="c", input=texts[3], reference=texts[0], answers=answers, scores={})
    _Reader(render_report(EVIDENCE, with_scores([item]), []))


def _section(page: str, heading: str) -> str:
    """A section from its heading on."""
    start = re.search(rf'<h2 id="[^"]*" tabindex="-1">{heading}', page)
    assert start is not None
    return page[start.start() :].split("</section>")[0]


def test_report_shows_every_broken_item_and_counts_fixed_ones() -> None:
    items = make_items(200)
    evidence = make_evidence(items)
    page = render_report(evidence, items, [])
    first = evidence.contrasts[0]
    broken, fixed, wrong = (_section(page, name) for name in ("Broken", "Fixed", "Still wrong"))
    assert broken.count("<li>") == first.broken > 0
    assert f"Broken: {first.broken} items" in page
    assert fixed.count("<li>") == first.fixed > SHOWN_FIXED
    assert fixed.split("<details>")[0].count("<li>") == SHOWN_FIXED
    assert f"The other {first.fixed - SHOWN_FIXED} fixed items" in fixed
    right = round(200 * evidence.arm("tuned").score("exact_match").value) - first.fixed
    assert f"The remaining {right} of 200 items are right with both." in wrong
    assert wrong.count("<li>") == 200 - right - first.fixed - first.broken


def test_report_states_when_a_list_is_cut() -> None:
    items = make_items(130, tuned=0, retrieved=0)
    page = render_report(make_evidence(items), items, [])
    assert _section(page, "Still wrong").count("<li>") == SHOWN_STILL_WRONG
    assert f"The first {SHOWN_STILL_WRONG} of 130 (all are in items.jsonl)" in page


def test_report_marks_differences() -> None:
    answers = {"zero-shot": "", "retrieved-4": "Ala. Civ. App. Ct.", "tuned": "Ala Civ. App."}
    item = Item(key="k", cluster="c", input="x", reference="Ala. Civ. App.", answers=answers, scores={})
    page = render_report(EVIDENCE, with_scores([item]), [])
    assert "Ala. Civ. App.<mark> Ct.</mark>" in page
    assert 'Ala<mark class="missing" title="missing: ."></mark> Civ. App.' in page


def test_report_shows_an_empty_answer() -> None:
    item = ITEMS[0].model_copy(update={"answers": ITEMS[0].answers | {"tuned": ""}})
    assert "<em>(empty)</em>" in render_report(EVIDENCE, with_scores([item]), [])


@pytest.mark.parametrize("metric", ["exact_match", "bleu"])
def test_cross_fitted_report_shows_folds_and_no_test_split(metric: Metric) -> None:
    page = render_report(cross_fitted(make_evidence(ITEMS, metric=metric)), ITEMS, [])
    text = _Reader(page).text
    assert "each answered once: by the one of 5 adapters that saw no row of its cluster" in text
    assert _section(page, "The folds").count("<tr>") == 6
    assert "0.900, 0.412" in text
    assert "Bengio & Grandvalet 2004" in text
    for absent in ("Arms on the test split", "on the dev split", "loss history"):
        assert absent not in text


def test_loss_caption_names_the_lowest_dev_loss() -> None:
    history = [{"step": s, "epoch": 1, "eval_loss": loss} for s, loss in ((10, 0.9), (20, 0.412), (30, 0.5))]
    page = render_report(EVIDENCE, ITEMS, history)
    message = (
        "Dev loss was lowest at step 20 (0.412) and 0.500 at the end. The adapter of step 20 was kept, by the dev loss."
    )
    assert message in page
    for row, score in zip(history, (0.25, 0.5, 0.75), strict=True):
        row["eval_metric"] = score
    page = render_report(EVIDENCE, ITEMS, history)
    assert "The adapter of step 30 was kept, by its exact match on dev: 75.0%." in page
    assert "No dev loss was measured" in render_report(EVIDENCE, ITEMS, [{"step": 1, "loss": 1.0}])


@pytest.mark.parametrize("count", [1, 12])
def test_bleu_projects_and_tiny_ones_have_a_report(count: int) -> None:
    items = make_items(count)
    text = _Reader(render_report(make_evidence(items, metric="bleu"), items, make_history())).text
    assert "Deciding metric: BLEU, corpus BLEU, sacrebleu's (nrefs:1" in text
    assert "Scored higher with tuned than with retrieved-4." in text


@pytest.mark.slow
def test_report_is_reproducible(tmp_path: Path) -> None:
    """In another process too, where Python's hashes of strings are others."""
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from making.evidence import *; from tunewright.report.page import render_report\n"
        "items = make_items(60); evidence = make_evidence(items, also=['bleu'])\n"
        "Path(sys.argv[2]).write_text(render_report(evidence, items, make_history()), encoding='utf-8')"
    )
    out = tmp_path / "report.html"
    helpers = str(Path(__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", program, helpers, str(out)], check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert out.read_text(encoding="utf-8") == _page()
