"""Sections on test items: by the effect of training on them, and by their distance from the training data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from tunewright.config import MetricName
from tunewright.core.text import capitalised, changes, count_of
from tunewright.evidence.blocks import TONES
from tunewright.evidence.common import OutputTemplates, Subset, TrainSimilarity
from tunewright.evidence.files import CHANGES, Change, change_of
from tunewright.evidence.schema import Contrast, Evidence, Item
from tunewright.evidence.verdict import changed_words
from tunewright.metrics import axis_label, points_text
from tunewright.render.blocks import (
    Bands,
    Block,
    Cell,
    Items,
    Lead,
    Row,
    Section,
    Series,
    ShownAnswer,
    ShownItem,
    row,
    table,
)

SHOWN_FIXED = 30
SHOWN_STILL_WRONG = 100

Numbered = tuple[int, Item]


def item_sections(evidence: Evidence, items: Sequence[Item]) -> tuple[Section, ...]:
    """Return broken items in full, then fixed ones, then items that are still wrong."""
    first = evidence.contrasts[0]
    groups: dict[Change, list[Numbered]] = {name: [] for name in CHANGES}
    for numbered in enumerate(items, start=1):
        groups[change_of(numbered[1], first.treatment, first.control, first.metric)].append(numbered)
    graded = evidence.metrics[first.metric].kind != "right or wrong"
    better, worse = changed_words(evidence, first.metric)
    ours, theirs = first.treatment, first.control
    lost, gained = f"Right with {theirs}, wrong with {ours}.", f"Wrong with {theirs}, right with {ours}."
    if graded:
        lost, gained = (f"Scored {how} with {ours} than with {theirs}." for how in ("lower", "higher"))
    lost += " Words that are not in the reference are marked; ‸ stands where words are missing."
    broken, fixed = groups["broken"], groups["fixed"]
    shown: list[Block] = [Lead(gained), Items(_shown(fixed[:SHOWN_FIXED], first))]
    if more := fixed[SHOWN_FIXED:]:
        shown.append(Items(_shown(more, first), f"The other {len(more)} {better} items"))
    return (
        Section("broken", f"{capitalised(worse)}: {_count(broken)}", (Lead(lost), Items(_shown(broken, first)))),
        Section("fixed", f"{capitalised(better)}: {_count(fixed)}", tuple(shown)),
        _still_wrong(evidence, groups, graded=graded),
    )


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
    return count_of(len(items), "item")


def _shown(numbered: Sequence[Numbered], contrast: Contrast) -> tuple[ShownItem, ...]:
    found = []
    for number, item in numbered:
        answers = (shown_answer(item, arm, contrast.metric) for arm in (contrast.control, contrast.treatment))
        found.append(ShownItem(number, item.input, item.reference, tuple(answers)))
    return tuple(found)


def shown_answer(item: Item, arm: str, metric: MetricName) -> ShownAnswer:
    """Split the arm's answer by words where it differs from the reference; a full score counts as right."""
    answer, reference = item.answers[arm], item.reference
    score = item.scores.get(metric, {}).get(arm)
    right, mark = score == 1, "not scored"
    if score is not None:
        mark = {1.0: "✓ right", 0.0: "✗ wrong"}.get(score, f"score {score:.2f}")
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


def similarity_section(evidence: Evidence) -> Section | None:
    """Return each arm's score by similarity to training inputs, and a conclusion for the farthest items."""
    found = evidence.train_similarity
    if found is None:
        return None
    bands = {f"{band.low:.1f} to {band.high:.1f}": band for band in found.bands}
    lead = (
        f"The {evidence.split} items by similarity to the training rows: the {found.similarity}. "
        f"{_answer(evidence, found)} The bands are not adjusted for multiple "
        "comparisons and decide nothing."
    )
    below, axis = "similarity of the nearest training input", axis_label(evidence.metric)
    title = f"Arms by {axis} in bands of similarity to the nearest training input"
    figure = Bands("train-similarity", title, _names(bands), _series(evidence, bands), axis, below)
    scores = table("Table of scores by distance", *_scores(evidence, found, "Similarity", bands))
    return Section("train-similarity", "Does it only work on near copies?", (Lead(lead), figure, scores))


def templates_section(evidence: Evidence) -> Section | None:
    """Return each arm's score on items with a trained output template, and with a new one."""
    found = evidence.output_templates
    if found is None:
        return None
    named = {"seen template": found.seen, "new template": found.new}
    bands = {name: part for name, part in named.items() if part is not None}
    lead = (
        f"The {evidence.split} items by whether a training row has the same output once quoted strings "
        f"and numbers are masked. {_template_answer(found, evidence.items)} These bands decide nothing."
    )
    below, axis = "output template: quoted strings and numbers masked", axis_label(evidence.metric)
    title = f"Arms by {axis} on items with a seen and with a new output template"
    figure = Bands("output-templates", title, _names(bands), _series(evidence, bands), axis, below)
    scores = table("Table of scores by output template", *_scores(evidence, found, "Output template", bands))
    return Section("output-templates", "Does it only work on outputs of a known form?", (Lead(lead), figure, scores))


def _template_answer(found: OutputTemplates, items: int) -> str:
    if found.new is None:
        return "Every item has a template that was trained on, so this is unknown."
    share = f"{found.new.items:,} of {items:,} {'has' if found.new.items == 1 else 'have'} a new template"
    if found.new.difference is None or found.new.interval is None:
        return f"{share}, and none of them is scored in both arms."
    return (
        f"{share}: there {found.treatment} minus {found.control} is {points_text(found.new.difference)} points, 95% "
        f"interval {found.new.interval.points}."
    )


def _names(bands: Mapping[str, Subset]) -> tuple[str, ...]:
    return tuple(f"{name}\n{count_of(band.items, 'item')}" for name, band in bands.items())


def _series(evidence: Evidence, bands: Mapping[str, Subset]) -> tuple[Series, ...]:
    return tuple(
        Series(
            arm.name,
            TONES[arm.kind],
            tuple(
                (place, 100 * score.value, 100 * score.interval.low, 100 * score.interval.high)
                for place, band in enumerate(bands.values())
                if (score := band.scores.get(arm.name)) is not None
            ),
        )
        for arm in evidence.arms
    )


def _answer(evidence: Evidence, found: TrainSimilarity) -> str:
    far = found.farther
    if far.difference is None or far.interval is None:
        return "The farther half of the items is not scored in both arms, so this is unknown."
    half = f"On the farther half of the items ({far.items:,}, similarity up to {far.high:.2f})"
    measured = f"{half} {found.treatment} minus {found.control} is {points_text(far.difference)} points, 95% interval "
    measured += far.interval.points
    if far.interval.low > evidence.margin:
        return f"No: {measured[0].lower()}{measured[1:]}, above the margin there as well."
    if far.interval.high <= evidence.margin:
        return f"Possibly: {measured[0].lower()}{measured[1:]}, not above the margin."
    return f"{measured}: that includes values on both sides of the margin, so this is unknown."


def _scores(
    evidence: Evidence, found: TrainSimilarity | OutputTemplates, what: str, bands: Mapping[str, Subset]
) -> tuple[tuple[str, ...], list[Row]]:
    """Return a table's head and rows: each arm's score, and the difference, by band."""
    arms, rows = [arm.name for arm in evidence.arms], []
    for name, band in bands.items():
        scored = (band.scores.get(arm) for arm in arms)
        cells = (Cell(f"{100 * s.value:.1f}", s.interval.percents) if s else Cell("none scored") for s in scored)
        difference = Cell("none scored")
        if band.difference is not None and band.interval is not None:
            difference = Cell(points_text(band.difference), band.interval.points)
        rows.append(row(name, Cell(f"{band.items:,}", count_of(band.clusters, "cluster")), *cells, difference))
    return (what, "Items", *arms, f"{found.treatment} − {found.control}, points"), rows
