"""Sections on test items: by the effect of training on them, and by their distance from the training data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from tunewright.config import MetricName
from tunewright.core.text import capitalised, changes, count_of
from tunewright.evidence.blocks import TONES
from tunewright.evidence.common import Band, BandScore, OutputTemplates, Subset, TrainSimilarity
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
    """Return broken items in full, then fixed ones, then those still wrong."""
    first = evidence.contrasts[0]
    groups: dict[Change, list[Numbered]] = {name: [] for name in CHANGES}
    for numbered in enumerate(items, start=1):
        groups[change_of(numbered[1], first.treatment, first.control, first.metric)].append(numbered)
    graded = evidence.metrics[first.metric].kind != "right or wrong"
    better, worse = changed_words(evidence, first.metric)
    return (
        _broken_section(first, worse, groups["broken"], graded=graded),
        _fixed_section(first, better, groups["fixed"], graded=graded),
        _still_wrong(evidence, groups, graded=graded),
    )


def _broken_section(first: Contrast, word: str, broken: Sequence[Numbered], *, graded: bool) -> Section:
    intro = (
        f"Scored lower with {first.treatment} than with {first.control}."
        if graded
        else f"Right with {first.control}, wrong with {first.treatment}."
    )
    lead = f"{intro} Words that are not in the reference are marked; ‸ stands where words are missing."
    return Section("broken", f"{capitalised(word)}: {_count(broken)}", (Lead(lead), Items(_shown(broken, first))))


def _fixed_section(first: Contrast, word: str, fixed: Sequence[Numbered], *, graded: bool) -> Section:
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


def similarity_section(evidence: Evidence) -> Section | None:
    """Return each arm's score by similarity to training inputs, and a conclusion for the farthest items."""
    found = evidence.train_similarity
    if found is None:
        return None
    figure = Bands(
        "train-similarity",
        f"Arms by {axis_label(evidence.metric)} in bands of similarity to the nearest training input",
        tuple(f"{_name(band)}\n{count_of(band.items, 'item')}" for band in found.bands),
        _series(evidence, found.bands),
        axis_label(evidence.metric),
        "similarity of the nearest training input",
    )
    arms = [arm.name for arm in evidence.arms]
    head = ("Similarity", "Items", *arms, f"{found.treatment} − {found.control}, points")
    rows = [_band_row(_name(band), band, arms) for band in found.bands]
    lead = (
        f"The {evidence.split} items by similarity to the training rows: the {found.similarity}. "
        f"{_answer(evidence, found)} The bands are not adjusted for multiple "
        "comparisons and decide nothing."
    )
    return Section(
        "train-similarity",
        "Does it only work on near copies?",
        (Lead(lead), figure, table("Table of scores by distance", head, rows)),
    )


def templates_section(evidence: Evidence) -> Section | None:
    """Return each arm's score on items with a trained output template, and with a new one."""
    found = evidence.output_templates
    if found is None:
        return None
    named = {"seen template": found.seen, "new template": found.new}
    bands = {name: part for name, part in named.items() if part is not None}
    figure = Bands(
        "output-templates",
        f"Arms by {axis_label(evidence.metric)} on items with a seen and with a new output template",
        tuple(f"{name}\n{count_of(part.items, 'item')}" for name, part in bands.items()),
        _series(evidence, list(bands.values())),
        axis_label(evidence.metric),
        "output template: quoted strings and numbers masked",
    )
    arms = [arm.name for arm in evidence.arms]
    head = ("Output template", "Items", *arms, f"{found.treatment} − {found.control}, points")
    rows = tuple(_band_row(name, part, arms) for name, part in bands.items())
    return Section(
        "output-templates",
        "Does it only work on outputs of a known form?",
        (
            Lead(
                f"The {evidence.split} items by whether a training row has the same output once quoted strings "
                f"and numbers are masked. {_template_answer(found, evidence.items)} These bands decide nothing."
            ),
            figure,
            table("Table of scores by output template", head, rows),
        ),
    )


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


def _series(evidence: Evidence, bands: Sequence[Subset]) -> tuple[Series, ...]:
    return tuple(
        Series(
            arm.name,
            TONES[arm.kind],
            tuple(
                (place, 100 * score.value, 100 * score.interval.low, 100 * score.interval.high)
                for place, band in enumerate(bands)
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


def _name(band: Band) -> str:
    return f"{band.low:.1f} to {band.high:.1f}"


def _band_row(name: str, band: Subset, arms: list[str]) -> Row:
    scores = [band.scores.get(name) for name in arms]
    difference = Cell("none scored")
    if band.difference is not None and band.interval is not None:
        difference = Cell(points_text(band.difference), band.interval.points)
    return row(name, Cell(f"{band.items:,}", count_of(band.clusters, "cluster")), *map(_score, scores), difference)


def _score(score: BandScore | None) -> Cell:
    if score is None:
        return Cell("none scored")
    return Cell(f"{100 * score.value:.1f}", score.interval.percents)
