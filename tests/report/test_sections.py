"""Every section shows what the evidence holds, figure for figure, and is absent where the evidence has nothing."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from making.command_line import tunewright
from making.evidence import make_evidence, make_history
from making.full_evidence import CURVE, GENERAL, ITEMS, JUDGE, REVIEW, full_evidence, vetoed
from making.human_evaluations import save
from making.signals import break_even, make_signals
from tunewright.advisor.advice import break_even_text
from tunewright.advisor.signals import Speed, find_matching_advice
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_json, write_text
from tunewright.evaluation.access_log import AccessLog
from tunewright.evidence.common import Interval
from tunewright.evidence.learning_curve import CURVE_FILE, curve_lines, find_curve, more_data
from tunewright.evidence.logged_access import openings_text
from tunewright.evidence.schema import Evidence
from tunewright.metrics import metric_label, points_text
from tunewright.report.items import similarity_section
from tunewright.report.page import render_report

FULL = full_evidence()
ADVICE = make_signals()
BARE = make_evidence(ITEMS)


class _Tables(HTMLParser):
    """The tables by label, each a list of rows, each a list of cells; and the text of each section by its anchor."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.sections: dict[str, str] = {}
        self.links: list[str] = []
        self._rows: list[list[str]] = []
        self._anchor = ""
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("class") == "scroll":
            self._rows = self.tables.setdefault(given["aria-label"] or "", [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = True
            self._rows[-1].append("")
        elif tag == "section":
            self._anchor = given.get("aria-labelledby") or ""
        elif tag == "a" and (given.get("href") or "").startswith("#"):
            self.links.append((given["href"] or "")[1:])

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False
            self._rows[-1][-1] = self._rows[-1][-1].strip()
        if tag == "section":
            self._anchor = ""

    def handle_data(self, data: str) -> None:
        if self._cell:
            self._rows[-1][-1] += data
        if self._anchor:
            self.sections[self._anchor] = self.sections.get(self._anchor, "") + data


def _read(evidence: Evidence, **given: Any) -> _Tables:
    return _Tables(render_report(evidence, ITEMS, given.get("history", []), given.get("curve"), given.get("advice")))


@cache
def _page() -> _Tables:
    """Return the report of everything, rendered when the first test reads it."""
    return _Tables(render_report(FULL, ITEMS, make_history(), CURVE, ADVICE))


def test_contrasts_have_raw_and_adjusted_p_values() -> None:
    rows = _page().tables["Table of contrasts"][1:]
    for contrast, row in zip(FULL.contrasts, rows, strict=True):
        assert row[0].startswith(f"{contrast.treatment} − {contrast.control}")
        assert row[1:3] == [metric_label(contrast.metric), points_text(contrast.difference)]
        assert row[3].startswith(f"{points_text(contrast.interval.low)} to {points_text(contrast.interval.high)}")
        raw, adjusted = contrast.p_value, contrast.p_adjusted
        assert row[4] == ("<1e-15" if raw < 1e-15 else f"{raw:.2g}") + f" {contrast.test}"
        assert row[5] == ("none" if adjusted is None else "<1e-15" if adjusted < 1e-15 else f"{adjusted:.2g}")
        assert row[6:8] == [str(contrast.fixed), str(contrast.broken)]
        assert row[8].startswith(f"{100 * contrast.minimum_detectable_effect:.1f}")


def test_arms_section_shows_the_deciding_metric_first() -> None:
    turned = FULL.model_copy(update={"metrics": dict(sorted(FULL.metrics.items()))})
    assert next(iter(turned.metrics)) == "bleu"
    head, *rows = _read(turned).tables["Table of arms"]
    assert head[1:6] == ["Right", "Exact match, %", "95% interval", "Corpus BLEU", "95% interval"]
    for arm, row in zip(FULL.arms, rows, strict=True):
        exact, bleu = arm.score("exact_match"), arm.score("bleu")
        assert row[0] == arm.name
        assert row[1:3] == [f"{round(60 * exact.value)} of 60", f"{100 * exact.value:.1f}"]
        assert row[3] == f"{100 * exact.interval.low:.1f} to {100 * exact.interval.high:.1f}"
        assert row[4] == f"{100 * bleu.value:.1f}"
        assert row[5] == f"{100 * bleu.interval.low:.1f} to {100 * bleu.interval.high:.1f}"
        assert row[6:] == [str(arm.truncated), f"{arm.prompt_tokens:.0f}", str(arm.shared_tokens)]


def test_scores_by_distance_match_the_evidence() -> None:
    assert FULL.train_similarity is not None
    for band, row in zip(FULL.train_similarity.bands, _page().tables["Table of scores by distance"][1:], strict=True):
        assert row[0] == f"{band.low:.1f} to {band.high:.1f}"
        assert row[1] == f"{band.items} {band.clusters} clusters"
        for arm, cell in zip(FULL.arms, row[2:], strict=False):
            own = band.scores[arm.name]
            assert cell == f"{100 * own.value:.1f} {100 * own.interval.low:.1f} to {100 * own.interval.high:.1f}"
        assert band.difference is not None
        assert row[-1].startswith(points_text(band.difference))


def test_scores_by_output_template_match_the_evidence() -> None:
    found = FULL.output_templates
    assert found is not None
    rows = _page().tables["Table of scores by output template"][1:]
    for name, part, row in zip(("seen template", "new template"), (found.seen, found.new), rows, strict=True):
        assert part is not None
        assert row[:2] == [name, f"{part.items} {part.clusters} clusters"]
        for arm, cell in zip(FULL.arms, row[2:], strict=False):
            own = part.scores[arm.name]
            assert cell == f"{100 * own.value:.1f} {100 * own.interval.low:.1f} to {100 * own.interval.high:.1f}"
        assert part.difference is not None
        assert row[-1].startswith(points_text(part.difference))
    assert "15 of 60 have a new template" in _page().sections["output-templates"]
    known = FULL.model_copy(update={"output_templates": found.model_copy(update={"new": None})})
    assert "this is unknown" in _read(known).sections["output-templates"]


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (0.03, 0.2, "No: on the farther half"),
        (-0.2, 0.01, "Possibly: "),
        (-0.1, 0.1, "this is unknown"),
    ],
)
def test_similarity_section_answers_by_the_farther_half(low: float, high: float, answer: str) -> None:
    found = FULL.train_similarity
    assert found is not None
    far = found.farther.model_copy(update={"interval": Interval(low=low, high=high)})
    changed = FULL.model_copy(update={"train_similarity": found.model_copy(update={"farther": far})})
    assert answer in _read(changed).sections["train-similarity"]


def test_suites_are_shown_with_margin_limit_and_controls() -> None:
    for suite, row in zip(GENERAL.suites, _page().tables["Table of suites"][1:], strict=True):
        scale, digits = (100, 1) if suite.unit == "share" else (1, 3)
        unit = "%" if suite.unit == "share" else " nats"
        assert row[0] == f"{suite.name} {suite.metric}"
        assert row[2:4] == [f"{scale * value:.{digits}f}{unit}" for value in (suite.base, suite.tuned)]
        assert row[4] == f"{scale * suite.drop:+.{digits}f}"
        assert row[5] == f"{scale * suite.interval.low:+.{digits}f} to {scale * suite.interval.high:+.{digits}f}"
        assert row[6].split()[0] == f"{scale * suite.limit:+.{digits}f}"
        assert row[7] == ("none" if suite.margin is None else f"{scale * suite.margin:.{digits}f}")
    controls = _page().tables["Table of the suites' controls"]
    assert ["trivia", "guessing", "500", "61.0%", "above 25%", "FAILED"] in controls
    assert "Not measured: gsm8k: needs the extra lm-eval" in _page().sections["regressions"]


def test_cost_section_separates_cached_tokens() -> None:
    for arm, row in zip(FULL.arms, _page().tables["Table of tokens"][1:], strict=True):
        assert row[1] == f"{arm.prompt_tokens:.0f}"
        assert row[2].startswith("41 ")
        assert row[3] == f"{arm.prompt_tokens - 41:.0f}"
        assert row[4] == "17.2"
    assert [row[4] for row in _read(BARE).tables["Table of tokens"][1:]] == ["not counted"] * 3


def test_cost_section_shows_the_break_even_and_its_inputs() -> None:
    message = _page().sections["cost"]
    assert break_even_text(ADVICE) in message
    assert "from 50,000 calls on (45,000 to 56,000)" in message
    assert _page().tables["Table of calls"] == [
        ["A call of", "Input tokens", "Of them in a prefix cache", "Output tokens", "Costs"],
        ["retrieved-4", "160", "20", "12.0", "0.002"],
        ["pilot-100", "40", "20", "12.0", "0.001"],
    ]
    assert [row[1] for row in _page().tables["Table of what training costs"][1:]] == [
        "40.00",
        "1.00",
        "9.00",
        "0",
        "50.00",
    ]
    assert "Advice 0123456789ab" in message
    assert "Costs of retrieved-4 and of training by the number of calls" in message
    assert "This machine" not in message


def test_break_even_in_machine_time_names_its_speeds() -> None:
    speed = {"retrieved-4": Speed(prefill=910, decode=61, rows=8)}
    even = break_even((400, 500, None), unit="machine hours").model_copy(update={"speed": speed})
    read = _read(FULL, advice=make_signals(break_even=even))
    assert [row[4] for row in read.tables["Table of calls"]] == ["Costs, machine time", "7.2 s", "3.6 s"]
    assert [row[1] for row in read.tables["Table of what training costs"][1:3]] == ["40.0 h", "3,600 s"]
    assert "retrieved-4 910 prompt and 61 answer tokens a second in a batch of 8" in read.sections["cost"]
    assert "from 500 calls on (400 to never)" in read.sections["cost"]


def test_break_even_is_never_and_not_drawn_without_a_saving() -> None:
    read = _read(FULL, advice=make_signals(break_even=break_even((None, None, None), saving=-0.001)))
    assert (
        "Cheaper calls alone never pay for training: a call costs 0.002 with retrieved-4, 0.003 tuned."
        in read.sections["cost"]
    )
    assert "by the number of calls" not in read.sections["cost"]
    assert read.tables["Table of calls"][2][4] == "0.003"


def test_judge_and_people_are_shown_with_controls_agreement_and_the_powered_estimate() -> None:
    found = JUDGE.preferences[0]
    first, plain, equal = _page().tables["Table of preferences"][1:]
    assert first[1:4] == ["31", "20", "9"]
    assert first[4] == f"{100 * found.rate.value:.1f}"
    assert plain[0].startswith("without markdown")
    assert equal[4] == "66.2"
    assert [row[-1] for row in _page().tables["Table of controls"][1:]] == ["holds", "holds"]
    assert "one family (llama)" in _page().sections["judge"]
    alone, powered = _page().tables["Table of win rates"][1:]
    assert (alone[1], powered[1]) == ("64.1", "65.2")
    assert _page().tables["Table of agreement"][1:] == [["ann and ben", "20", "17", "0.71", "0.43 to 0.92"]]
    assert [row[0] for row in _page().tables["Table of strata"][1:]] == ["fixed", "broken", "equal answers"]


def test_vetoed_judge_section_shows_the_veto_and_no_finding() -> None:
    read = _read(FULL.model_copy(update={"judge": vetoed(JUDGE)}))
    assert "vetoed, so its judgements do not count." in read.sections["judge"]
    assert [row[-1] for row in read.tables["Table of controls"][1:]] == ["FAILS", "holds"]
    assert not {"Table of preferences", "Table of judged arms"} & set(read.tables)


def test_openings_and_what_was_declared_are_shown() -> None:
    message = _page().sections["access-log"]
    assert "Line 3 of the access log, 2026-11-02 09:58 by ann." in message
    assert "tuned against retrieved-4 by exact match, margin 2 points, which decides" in message
    assert openings_text(FULL.openings, 60) in message
    row = ["line 1", "2026-10-28 16:02", "ben", "fedcba987654", "legal-0", "60"]
    assert _page().tables["Table of openings"][1:] == [row]
    assert "not been opened before" in _read(FULL.model_copy(update={"openings": ()})).sections["access-log"]


def test_prompting_section_shows_narrowing_draws_and_left_out_arms() -> None:
    message = _page().sections["prompting"]
    assert "Left out: retrieved-16, as 12 of 30 prompts do not fit the base's context." in message
    assert _page().tables["Table of draws"][1:] == [["static-4", "3", "30", "47.0", "41.0", "52.0"]]
    names = [row[0] for row in _page().tables["Table of all prompting arms"][1:]]
    assert names == ["zero-shot far behind the best", "retrieved-4 advanced"]


def test_training_section_shows_the_answer_of_the_learning_curve() -> None:
    for reason in more_data(CURVE).reasons:
        assert reason in _page().sections["more-data"]
    mean, *by_seed = curve_lines(CURVE).lines
    trained = {seed: [(p.rows, 100 * p.score) for p in CURVE.points if p.seed == seed] for seed in CURVE.seeds}
    assert [list(line.points) for line in by_seed] == [sorted(points) for points in trained.values()]
    assert min(map(min, trained.values())) < min(mean.points) and max(mean.points) < max(map(max, trained.values()))


def test_unmeasured_parts_have_no_section() -> None:
    bare = _read(BARE)
    gone = {"train-similarity", "output-templates", "regressions", "judge", "human-eval", "access-log", "more-data"}
    assert gone <= set(_page().sections)
    assert not gone & set(bare.sections)
    for read in (_page(), bare):
        assert read.links == list(read.sections)
    assert "Noise floor" not in bare.sections["contrasts"]


NASTY = '<script>alert(1)</script><img src=x onerror=alert(1)> & {{ 7*7 }} "q" </title></style></section>'


def test_every_section_escapes_users_text() -> None:
    general = GENERAL.model_copy(
        update={"suites": tuple(s.model_copy(update={"name": NASTY}) for s in GENERAL.suites), "not_measured": (NASTY,)}
    )
    who = tuple(each.model_copy(update={"name": NASTY}) for each in REVIEW.reviewers)
    assert FULL.opening is not None
    changed = FULL.model_copy(
        update={
            "regressions": general,
            "judge": JUDGE.model_copy(update={"model": NASTY}),
            "human_eval": REVIEW.model_copy(update={"reviewers": who}),
            "human_eval_incumbents": {NASTY: REVIEW.model_copy(update={"reviewers": who})},
            "opening": FULL.opening.model_copy(update={"author": NASTY}),
        }
    )
    page = render_report(changed, ITEMS, [])
    assert not re.search(r"<(script|img)|\bon\w+=alert(?!\(1\)&gt;)", page.replace("onerror=alert(1)&gt;", ""))
    read = _Tables(page)
    for anchor in ("regressions", "judge", "human-eval", "human-eval-incumbent-1", "access-log"):
        assert NASTY in read.sections[anchor]


def test_people_against_an_incumbent_have_a_section_apart() -> None:
    other = REVIEW.model_copy(update={"control": "incumbent-hosted", "preferred": (3, 9)})
    both = FULL.model_copy(update={"human_eval": REVIEW, "human_eval_incumbents": {"hosted": other}})
    read = _Tables(render_report(both, ITEMS, []))
    assert "incumbent-hosted" not in read.sections["human-eval"]
    apart = read.sections["human-eval-incumbent-1"]
    assert "against the model in use, hosted" in apart and "incumbent-hosted on 9" in apart
    assert "affects neither the verdict" in apart
    alone = both.model_copy(update={"human_eval": None})
    assert "human-eval" not in _Tables(render_report(alone, ITEMS, [])).sections


# The learning curve of the same data


def test_report_uses_the_newest_curve_of_the_same_data_base_and_metric(tmp_path: Path) -> None:
    lineage = {"dataset": digest("d"), "base": {"spec": "b", "digest": "1"}}
    evidence = BARE.model_copy(update={"lineage": lineage})
    assert find_curve(tmp_path, evidence) is None
    others: dict[str, dict[str, Any]] = {
        "old": {"created": "2026-01-01"},
        "new": {"created": "2026-03-01"},
        "other": {"created": "2026-04-01", "dataset": digest("e")},
        "base": {"created": "2026-05-01", "base": {"spec": "b", "digest": "2"}},
    }
    for name, changes in others.items():
        curve = CURVE.model_copy(update={"id": name, "lineage": lineage | changes})
        write_json(tmp_path / name / CURVE_FILE, curve.model_dump(mode="json"))
    found = find_curve(tmp_path, evidence)
    assert found is not None
    assert found.id == "new"
    by_other = evidence.model_copy(update={"metric": "bleu"})
    assert find_curve(tmp_path, by_other) is None
    write_text(tmp_path / "bad" / CURVE_FILE, "{}")
    with pytest.raises(UserError, match="Invalid learning curve"):
        find_curve(tmp_path, evidence)


def test_report_uses_the_newest_matching_advice_with_a_break_even(tmp_path: Path) -> None:
    lineage = {"dataset": digest("d"), "base": {"spec": "b", "digest": "1"}}
    evidence = BARE.model_copy(update={"lineage": lineage})
    assert find_matching_advice(tmp_path, evidence) is None

    def store(name: str, **changes: Any) -> None:
        given = {"lineage": lineage | changes.pop("lineage"), **changes}
        write_json(tmp_path / f"{name}.json", make_signals(id=name, **given).model_dump(mode="json"))

    def found(evidence: Evidence) -> str | None:
        advice = find_matching_advice(tmp_path, evidence)
        return None if advice is None else advice.id

    store("bare", lineage={"created": "2026-02-01"}, break_even=None)
    store("other", lineage={"created": "2026-06-01", "dataset": digest("e")})
    store("base", lineage={"created": "2026-06-01", "base": {"spec": "b", "digest": "2"}})
    assert found(evidence) == "bare"
    store("old", lineage={"created": "2026-01-01"})
    assert found(evidence) == "old"
    store("new", lineage={"created": "2026-01-02"})
    assert found(evidence) == "new"
    assert found(evidence.model_copy(update={"metric": "bleu"})) is None
    write_text(tmp_path / "bad.json", "{}")
    with pytest.raises(UserError, match="Not advice of schema"):
        find_matching_advice(tmp_path, evidence)


def test_report_command_needs_only_the_evaluation(tmp_path: Path, tiny_base_folder: Path) -> None:
    write_text(tmp_path / "tunewright.yaml", f"name: p\nbase_model: {tiny_base_folder}\n")
    folder = tmp_path / "evaluations" / FULL.id
    save(folder, ITEMS, FULL.model_copy(update={"opening": None}))
    ran = tunewright("report", "-p", tmp_path)
    assert ran.code == 0, ran.stderr
    assert "The evaluated adapter was removed" in ran.stderr
    read = _Tables((folder / "report.html").read_text())
    assert "`tunewright advise` measures it" in read.sections["cost"]
    assert {"train-similarity", "regressions", "human-eval", "judge"} <= set(read.sections)
    assert _page().tables["Table of arms"] == read.tables["Table of arms"]


def test_unscored_bands_have_no_answer() -> None:
    found = FULL.train_similarity
    assert found is not None
    far = found.bands[0].model_copy(update={"difference": None, "interval": None, "scores": {}})
    changed = FULL.model_copy(
        update={"train_similarity": found.model_copy(update={"bands": (far, *found.bands[1:]), "farther": far})}
    )
    section = similarity_section(changed)
    assert section is not None
    assert "not scored in both arms" in section.blocks[0].text  # type: ignore[union-attr]
    assert _read(changed).tables["Table of scores by distance"][1][2:] == ["none scored"] * 4


def test_report_command_uses_the_projects_advice(tmp_path: Path, tiny_base_folder: Path) -> None:
    write_text(tmp_path / "tunewright.yaml", f"name: p\nbase_model: {tiny_base_folder}\n")
    folder = tmp_path / "evaluations" / FULL.id
    save(folder, ITEMS, FULL.model_copy(update={"opening": None}))
    advice = make_signals(lineage=FULL.lineage)
    file = tmp_path / "advice" / f"{advice.id}.json"
    AccessLog(tmp_path / "evaluations").write(file, advice.model_dump_json())
    ran = tunewright("report", "-p", tmp_path)
    assert ran.code == 0, ran.stderr
    read = _Tables((folder / "report.html").read_text())
    assert read.tables["Table of calls"] == _page().tables["Table of calls"]
