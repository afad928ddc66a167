"""Section on scores by distance from the training data, for near copies and for known output templates."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.core.text import count_of
from tunewright.evidence.schema import Evidence
from tunewright.evidence.train_similarity import Band, BandScore, OutputTemplates, Subset, TrainSimilarity
from tunewright.metrics import axis_label, points_text
from tunewright.render.blocks import Bands, Cell, Lead, Row, Section, Series, Table, row, table
from tunewright.report.sections.arms import TONES
from tunewright.report.text import percent_interval, points_interval


def section(evidence: Evidence) -> Section | None:
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
    lead = (
        f"The {evidence.split} items by similarity to the training rows: the {found.similarity}. "
        f"{_answer(evidence, found)} The bands are not adjusted for multiple "
        "comparisons and decide nothing."
    )
    return Section(
        "train-similarity",
        "Does it only work on near copies?",
        (Lead(lead), figure, _table(evidence, found)),
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
    rows = tuple(_row(name, part, arms) for name, part in bands.items())
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
        f"interval {points_interval(found.new.interval)}."
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
    measured += points_interval(far.interval)
    if far.interval.low > evidence.margin:
        return f"No: {measured[0].lower()}{measured[1:]}, above the margin there as well."
    if far.interval.high <= evidence.margin:
        return f"Possibly: {measured[0].lower()}{measured[1:]}, not above the margin."
    return f"{measured}: that includes values on both sides of the margin, so this is unknown."


def _name(band: Band) -> str:
    return f"{band.low:.1f} to {band.high:.1f}"


def _table(evidence: Evidence, found: TrainSimilarity) -> Table:
    arms = [arm.name for arm in evidence.arms]
    head = ("Similarity", "Items", *arms, f"{found.treatment} − {found.control}, points")
    return table("Table of scores by distance", head, (_row(_name(band), band, arms) for band in found.bands))


def _row(name: str, band: Subset, arms: list[str]) -> Row:
    scores = [band.scores.get(name) for name in arms]
    difference = Cell("none scored")
    if band.difference is not None and band.interval is not None:
        difference = Cell(points_text(band.difference), points_interval(band.interval))
    return row(name, Cell(f"{band.items:,}", count_of(band.clusters, "cluster")), *map(_score, scores), difference)


def _score(score: BandScore | None) -> Cell:
    if score is None:
        return Cell("none scored")
    return Cell(f"{100 * score.value:.1f}", percent_interval(score.interval))
