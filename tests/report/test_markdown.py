"""The verdict as a comment: what GitHub shows of it, by a real markdown parser."""

import re
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from making.command_line import tunewright
from making.evidence import make_evidence, make_items
from making.full_evidence import GENERAL, JUDGE, REVIEW
from making.property_examples import examples
from tunewright.core.io import write_json
from tunewright.evidence.benchmarks import suite_text
from tunewright.evidence.schema import Evidence
from tunewright.evidence.verdict import verdict
from tunewright.render.markdown import plain
from tunewright.report.verbs import markdown_of

EVIDENCE = make_evidence(make_items(60), also=["bleu"])
FULL = EVIDENCE.model_copy(update={"regressions": GENERAL, "judge": JUDGE, "human_eval": REVIEW})
GITHUB = MarkdownIt("commonmark").enable(["table", "strikethrough"])
NASTY = (
    "a | b\n# c @team/all #12 GH-3 <img src=x onerror=alert(1)> [l](http://x) ![i](y) `c` **b** ~~s~~ &lt; \\ \u202e"
)


def _inline(text: str) -> list[Token]:
    return [child for token in GITHUB.parse(text) for child in token.children or []]


def _shown(tokens: list[Token]) -> str:
    return "".join(token.content if token.type in {"text", "text_special"} else " " for token in tokens)


def _lines(text: str) -> str:
    return "\n".join(_shown(token.children or []) for token in GITHUB.parse(text) if token.type == "inline")


def _tables(text: str) -> list[list[list[str]]]:
    tables: list[list[list[str]]] = []
    inside = False
    for token in GITHUB.parse(text):
        if token.type.startswith("table_"):
            inside = token.type == "table_open"
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and inside:
            tables[-1][-1].append(_shown(token.children or []))
    return tables


def _kinds(text: str) -> list[str]:
    """The blocks and inline markup of a text, without what is written in it."""
    return [t.type for t in GITHUB.parse(text)] + [t.type for t in _inline(text) if not t.type.startswith("text")]


def test_comment_has_the_verdict_and_every_reason() -> None:
    text = markdown_of(EVIDENCE)
    shown = _lines(text)
    assert text.startswith("## Ship: court-citations\n")
    for reason in verdict(EVIDENCE).reasons:
        assert reason in shown


def test_comment_lists_suites_once_and_why_one_does_not_decide() -> None:
    shown = _lines(markdown_of(FULL))
    assert not any(suite_text(suite) in shown for suite in GENERAL.suites)
    assert "Not measured: gsm8k: needs the extra lm-eval" in shown
    assert [row[-1] for row in _tables(markdown_of(FULL))[2][1:]] == [
        "not worse", "no margin: decides nothing", "decides nothing: guessing failed", "no margin: decides nothing",
    ]  # fmt: skip


def _with_text(text: str) -> Evidence:
    """Every place that takes a user's text, taken by this one."""
    suites = tuple(suite.model_copy(update={"name": text}) for suite in GENERAL.suites)
    reviewer = REVIEW.model_copy(update={"lacking": text, "win_rate": None, "powered": None})
    first = FULL.contrasts[0].model_copy(update={"left_out": {text: 3}})
    changes: dict[str, Any] = {
        "project": text,
        "regressions": GENERAL.model_copy(update={"suites": suites}),
        "judge": JUDGE.model_copy(update={"model": text}),
        "human_eval": reviewer,
        "contrasts": [first, *FULL.contrasts[1:]],
    }
    return FULL.model_copy(update=changes)


KINDS = _kinds(markdown_of(_with_text("x")))


@examples(30)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("|@#`*_<>[]()!~\\&-+=\n\t 1.:")), max_size=30))
@example(NASTY)
@example("")
@example("# h")
@example("1. a")
@example("---")
@example("12) b")
@example("www.example.org https://example.org a@b.org")
def test_comment_escapes_markup_and_mentions(text: str) -> None:
    markdown = markdown_of(_with_text(text))
    assert _kinds(markdown) == KINDS
    assert not re.search(r"[@#]\w|\bGH-\d|://|\bwww\.\w", _lines(markdown), re.IGNORECASE)


def test_comment_shows_text_unchanged() -> None:
    shown = _shown(GITHUB.parseInline(plain(NASTY))[0].children or [])
    expected = " ".join(NASTY.replace("\u202e", "\ufffd").split())
    assert shown.replace("\u200b", "") == expected


def test_verdict_comment_goes_to_stdout_and_keeps_the_exit_code(tmp_path: Path) -> None:
    write_json(tmp_path / "evidence.json", EVIDENCE.model_dump(mode="json"))
    ran = tunewright("verdict", tmp_path / "evidence.json", "--markdown", "-p", tmp_path)
    assert (ran.code, ran.stdout) == (0, markdown_of(EVIDENCE))
    both = tunewright("verdict", tmp_path / "evidence.json", "--markdown", "--json", "-p", tmp_path)
    assert both.document["markdown"] == ran.stdout
    assert "markdown" not in tunewright("verdict", tmp_path / "evidence.json", "--json", "-p", tmp_path).document
