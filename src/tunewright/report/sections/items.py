"""Section on test items: broken, fixed and still wrong, with word differences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from tunewright.config import MetricName
from tunewright.core.text import changes
from tunewright.evidence.items import CHANGES, Change, change_of
from tunewright.evidence.schema import Contrast, Evidence, Item
from tunewright.evidence.verdict import changed_words
from tunewright.render.blocks import Block, Items, Lead, Section, ShownAnswer, ShownItem
from tunewright.report.text import capitalised

SHOWN_FIXED = 30
SHOWN_STILL_WRONG = 100

Numbered = tuple[int, Item]


def sections(evidence: Evidence, items: Sequence[Item]) -> tuple[Section, ...]:
    """Return broken items in full, then fixed ones, then those still wrong."""
    first = evidence.contrasts[0]
    groups = _sorted_items(items, first)
    graded = evidence.metrics[first.metric].kind != "right or wrong"
    better, worse = changed_words(evidence, first.metric)
    return (
        _broken(first, worse, groups["broken"], graded=graded),
        _fixed(first, better, groups["fixed"], graded=graded),
        _still_wrong(evidence, groups, graded=graded),
    )


def _broken(first: Contrast, word: str, broken: Sequence[Numbered], *, graded: bool) -> Section:
    intro = (
        f"Scored lower with {first.treatment} than with {first.control}."
        if graded
        else f"Right with {first.control}, wrong with {first.treatment}."
    )
    lead = f"{intro} Words that are not in the reference are marked; ‸ stands where words are missing."
    return Section("broken", f"{capitalised(word)}: {_count(broken)}", (Lead(lead), Items(_shown(broken, first))))


def _fixed(first: Contrast, word: str, fixed: Sequence[Numbered], *, graded: bool) -> Section:
    lead = (
        f"Scored higher with {first.treatment} than with {first.control}."
        if graded
        else f"Wrong with {first.control}, right with {first.treatment}."
    )
    blocks: list[Block] = [Lead(lead), Items(_shown(fixed[:SHOWN_FIXED], first))]
    if more := fixed[SHOWN_FIXED:]:
        blocks.append(Items(_shown(more, first), f"The other {len(more)} {word} items"))
    return Section("fixed", f"{capitalised(word)}: {_count(fixed)}", tuple(blocks))


def _still_wrong(evidence: Evidence, groups: dict[Change, list[Numbered]], *, graded: bool) -> Section:
    first, wrong = evidence.contrasts[0], groups["both wrong"]
    rest = f"The remaining {len(groups['both right'])} of {evidence.items} items"
    lead = (
        f"The same score with both arms, less than the full one. {rest} have the full score with both."
        if graded
        else f"Wrong with both arms. {rest} are right with both."
    )
    if unscored := len(groups["not scored"]):
        lead += f" {unscored} could not be scored in both arms and are left out."
    blocks: list[Block] = [Lead(lead)]
    if wrong:
        summary = f"Show {'it' if len(wrong) == 1 else 'them'}"
        if len(wrong) > SHOWN_STILL_WRONG:
            summary = f"The first {SHOWN_STILL_WRONG} of {len(wrong)} (all are in items.jsonl)"
        blocks.append(Items(_shown(wrong[:SHOWN_STILL_WRONG], first), summary))
    return Section("still-wrong", f"{'As before' if graded else 'Still wrong'}: {_count(wrong)}", tuple(blocks))


def _count(items: Sequence[Numbered]) -> str:
    return f"{len(items)} {'item' if len(items) == 1 else 'items'}"


def _sorted_items(items: Sequence[Item], contrast: Contrast) -> dict[Change, list[Numbered]]:
    """Return the items, numbered from 1 in their own order, grouped by the treatment's effect on their score."""
    groups: dict[Change, list[Numbered]] = {name: [] for name in CHANGES}
    for number, item in enumerate(items, 1):
        change = change_of(item, contrast.treatment, contrast.control, contrast.metric)
        groups[change].append((number, item))
    return groups


def _shown(numbered: Sequence[Numbered], contrast: Contrast) -> tuple[ShownItem, ...]:
    return tuple(
        ShownItem(
            number,
            item.input,
            item.reference,
            tuple(shown_answer(item, arm, contrast.metric) for arm in (contrast.control, contrast.treatment)),
        )
        for number, item in numbered
    )


def shown_answer(item: Item, arm: str, metric: MetricName) -> ShownAnswer:
    """Split the arm's answer by words where it differs from the reference; a full score counts as right."""
    answer, reference = item.answers[arm], item.reference
    score = item.scores.get(metric, {}).get(arm)
    right, mark = score == 1, _mark(score)
    if right or not answer:
        return ShownAnswer(arm, right, mark, (("same", answer),))
    theirs, ours = (re.findall(r"\w+|\s+|.", text) for text in (reference, answer))
    pieces: list[tuple[Literal["same", "extra", "missing"], str]] = []
    for tag, a, b, c, d in changes(theirs, ours):
        if c < d:
            pieces.append(("same" if tag == "equal" else "extra", "".join(ours[c:d])))
        else:
            pieces.append(("missing", "".join(theirs[a:b])))
    return ShownAnswer(arm, right, mark, tuple(pieces))


def _mark(score: float | None) -> str:
    if score is None:
        return "not scored"
    return {1.0: "✓ right", 0.0: "✗ wrong"}.get(score, f"score {score:.2f}")
