"""Merged logs of reviews: no verdict is lost, whatever the order and the clocks."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from making.property_examples import examples
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.data.review.acceptance import FixedPlan, SequentialPlan
from tunewright.data.review.reviews import (
    DrawEvent,
    Event,
    NoteEvent,
    UndoEvent,
    Verdict,
    VerdictEvent,
    append_reviews,
    merge_reviews,
    read_reviews,
)

SECONDS = st.integers(0, 3).map(lambda s: f"2026-11-24T12:00:0{s}+00:00")
REVIEWERS = st.sampled_from(["ada", "ben"])
KEYS = st.sampled_from(["k1", "k2"])
WORDS: st.SearchStrategy[Verdict] = st.sampled_from(["right", "wrong", "skip"])
VERDICTS_GIVEN = st.builds(
    VerdictEvent, version=st.just("v"), reviewer=REVIEWERS, when=SECONDS, key=KEYS, verdict=WORDS
)
NOTED = st.builds(
    NoteEvent, version=st.just("v"), reviewer=REVIEWERS, when=SECONDS, key=KEYS, text=st.sampled_from(["", "why"])
)
UNDONE = st.builds(UndoEvent, version=st.just("v"), reviewer=REVIEWERS, when=SECONDS, key=KEYS)
PLANS: st.SearchStrategy[SequentialPlan | FixedPlan] = st.sampled_from(
    [SequentialPlan(), FixedPlan(), FixedPlan(allowed=2)]
)
DRAWN = st.builds(DrawEvent, version=st.just("v"), reviewer=REVIEWERS, when=SECONDS, draw=st.integers(0, 2), plan=PLANS)
LOGS = st.lists(VERDICTS_GIVEN | NOTED | UNDONE | DRAWN, max_size=8)

fast = examples(60)


def _log(root: Path, name: str, old: Sequence[Event], new: Sequence[Event]) -> Path:
    """A dataset folder whose log begins with lines as earlier releases wrote them."""
    dataset = root / name
    dataset.mkdir()
    lines = [canonical_json(event.model_dump(mode="json", exclude_none=True)) + "\n" for event in old]
    (dataset / "reviews.jsonl").write_text("".join(lines))
    append_reviews(dataset, new)
    return dataset


def _united(into: Path, *others: Path) -> Path:
    for other in others:
        merge_reviews(into, read_reviews(other).events)
    return into


@fast
@given(prefix=LOGS, olds=st.tuples(LOGS, LOGS, LOGS), news=st.tuples(LOGS, LOGS, LOGS))
def test_merge_reviews_is_commutative_and_idempotent(
    prefix: list[Event], olds: tuple[list[Event], ...], news: tuple[list[Event], ...]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def made(name: str) -> list[Path]:
            parts = zip("abc", olds, news, strict=True)
            return [_log(root, f"{name}-{each}", [*prefix, *old], new) for each, old, new in parts]

        a, b, c = made("left")
        alone = read_reviews(a)
        before = (a / "reviews.jsonl").read_bytes()
        left = _united(a, b, c)
        a, b, c = made("right")
        right = _united(c, _united(b, a))
        one, other = read_reviews(left), read_reviews(right)
        assert one.events == other.events
        assert one.stacks == other.stacks
        assert one.latest_draw("v") == other.latest_draw("v")
        assert set(alone.events) <= set(one.events)
        after = (left / "reviews.jsonl").read_bytes()
        assert after.startswith(before)  # lines that others cite stay where they are
        assert merge_reviews(left, other.events) == []
        assert (left / "reviews.jsonl").read_bytes() == after


@fast
@given(mine=LOGS, theirs=LOGS)
def test_merge_reviews_keeps_a_reviewers_order(mine: list[Event], theirs: list[Event]) -> None:
    mine = [event for event in mine if event.reviewer == "ada"]
    theirs = [event for event in theirs if event.reviewer == "ben"]
    with tempfile.TemporaryDirectory() as folder:
        a, b = (_log(Path(folder), name, [], events) for name, events in (("a", mine), ("b", theirs)))
        alone = [read_reviews(a), read_reviews(b)]
        both = read_reviews(_united(a, b))
        for key in ("k1", "k2"):
            assert both.current_verdicts(key) == {**alone[0].current_verdicts(key), **alone[1].current_verdicts(key)}


@fast
@given(st.lists(st.tuples(st.sampled_from("ab"), VERDICTS_GIVEN | UNDONE), max_size=12))
def test_merge_reviews_orders_a_reviewer_across_machines(
    steps: list[tuple[str, Event]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        logs = {name: _log(Path(folder), name, [], []) for name in "ab"}
        stacks: dict[tuple[str, str], list[str]] = {}
        for name, event in steps:
            _united(logs[name], logs["b" if name == "a" else "a"])
            append_reviews(logs[name], [event])
            assert not isinstance(event, DrawEvent)
            stack = stacks.setdefault((event.key, event.reviewer), [])
            if isinstance(event, VerdictEvent):
                stack.append(event.verdict)
            elif stack:
                stack.pop()
        found = read_reviews(_united(logs["a"], logs["b"]))
        for (key, reviewer), stack in stacks.items():
            stands = found.current_verdicts(key).get(reviewer)
            assert (stands.verdict if stands else None) == (stack[-1] if stack else None)


def _judged(key: str, when: str = "2026-11-24T12:00:00+00:00", **facts: str) -> VerdictEvent:
    return VerdictEvent.model_validate(
        {"key": key, "verdict": "right", "version": "v", "reviewer": "ada", "when": when, **facts}
    )


def test_merge_reviews_keeps_the_plan_of_the_first_draw(tmp_path: Path) -> None:
    facts = {"version": "v", "draw": 0, "reviewer": "ada"}
    first = DrawEvent.model_validate({**facts, "when": "2026-11-24T12:00:00+00:00", "plan": {"kind": "fixed"}})
    later = DrawEvent.model_validate({**facts, "when": "2026-11-24T13:00:00+00:00", "plan": {"kind": "sequential"}})
    a, b = _log(tmp_path, "a", [], [later]), _log(tmp_path, "b", [], [first])
    found = read_reviews(_united(a, b)).latest_draw("v")
    assert found is not None
    assert found.plan == FixedPlan()


def test_duplicate_line_counts_once(tmp_path: Path) -> None:
    undo = UndoEvent(version="v", reviewer="ada", when="2026-11-24T12:00:00+00:00", key="k")
    dataset = _log(tmp_path, "a", [], [_judged("k"), _judged("k", verdict="wrong"), undo])
    path = dataset / "reviews.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    assert read_reviews(dataset).current_verdicts("k")["ada"].verdict == "right"


def test_half_a_last_line_is_overwritten(tmp_path: Path) -> None:
    a, b = _log(tmp_path, "a", [], [_judged("k1")]), _log(tmp_path, "b", [], [_judged("k2")])
    whole = (a / "reviews.jsonl").read_bytes()
    (a / "reviews.jsonl").write_bytes(whole + whole[:30])
    added = merge_reviews(a, read_reviews(b).events)
    assert [event.key for event in added if isinstance(event, VerdictEvent)] == ["k2"]
    assert not read_reviews(a).torn
    assert len(read_reviews(a).events) == 2


@pytest.mark.parametrize("changed", ["verdict", "when", "reviewer"])
def test_merge_reviews_refuses_a_changed_line(tmp_path: Path, changed: str) -> None:
    dataset = _log(tmp_path, "a", [], [_judged("k1"), _judged("k2")])
    path = dataset / "reviews.jsonl"
    lines = path.read_text().splitlines()
    event = json.loads(lines[1])
    event[changed] = {"verdict": "wrong", "when": "2026-11-25T12:00:00+00:00", "reviewer": "eve"}[changed]
    path.write_text(f"{lines[0]}\n{canonical_json(event)}\n")
    before = path.read_bytes()
    for act in (lambda: read_reviews(dataset), lambda: append_reviews(dataset, [_judged("k3")])):
        with pytest.raises(UserError, match="its digest does not match") as caught:
            act()
        assert caught.value.where == f"{path}:2"
    assert path.read_bytes() == before
