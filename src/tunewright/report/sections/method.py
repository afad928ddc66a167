"""Sections on the method and the inputs of the measurement, and on openings of the test items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tunewright.core.io import digest
from tunewright.evidence.logged_access import Declared, EarlierAccess, LoggedAccess, openings_text
from tunewright.evidence.schema import Evidence
from tunewright.metrics import metric_label
from tunewright.render.blocks import Block, Lead, Notes, Row, Section, Table, row, table, words
from tunewright.report.text import metric_order


def section(evidence: Evidence) -> Section:
    """Return sentences about metrics, margin, intervals and tests."""
    first = evidence.contrasts[0]
    deciding, *others = metric_order(evidence)
    paragraphs = [
        f"Deciding metric: {metric_label(deciding)}, {evidence.metrics[deciding].definition}. The margin, the smallest "
        f"gain worth shipping, is {100 * evidence.margin:g} points.",
        "Items of one cluster are alike, so they count together: intervals and tests treat whole clusters.",
    ]
    if evidence.design == "cross-fitted":
        paragraphs.append(
            "Clusters are treated as independent, although items of a fold share an adapter and folds share training "
            "rows. For another set of pairs the intervals are somewhat too narrow (Bengio & Grandvalet 2004)."
        )
    paragraphs += [
        f"Intervals: {evidence.arm(first.treatment).score(deciding).method} for an arm; {first.interval_method} for "
        "the difference.",
        f"Only the first contrast decides. Its p-value is adjusted (Holm 1979) for the {len(evidence.deciding)} that "
        "were declared; those by other metrics are also measured, but not adjusted.",
        *(f"Also measured: {metric_label(name)}, {evidence.metrics[name].definition}." for name in others),
    ]
    return Section("method", "How this was measured", (Notes(tuple(paragraphs)),))


_LISTED = 20
"""A longer list, such as the keys of preference pairs, is its length and digest."""


def lineage(evidence: Evidence) -> Section:
    """Return the lineage recorded in the evidence."""
    rows = tuple(row(name, value) for name, value in _flat(evidence.lineage))
    table = Table("Table of lineage", (), rows, "lineage")
    return Section("lineage", "Lineage", (Lead("Inputs of these figures, by digest."), table))


def _flat(lineage: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested lineage as dotted names with their values."""
    rows = []
    for key, value in lineage.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows.extend(_flat(value, f"{name}."))
        elif isinstance(value, list) and len(value) > _LISTED:
            rows.append((name, f"{len(value):,} values, SHA-256 {digest(value)[:12]}"))
        else:
            rows.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def openings_section(evidence: Evidence) -> Section | None:
    """Return this access and earlier ones; None for evidence older than the access log."""
    opening = evidence.opening
    if opening is None:
        return None
    by = f" by {opening.author}" if opening.author else ""
    lead = (
        f"Line {opening.number} of the access log, {_day(opening.time)}{by}. Declared before any prompt was built: "
        f"{'; '.join(_declared(each) for each in opening.declared)}."
    )
    blocks: list[Block] = [Lead(lead)]
    if evidence.openings:
        head = ("Earlier opening", "When (UTC)", "By", "Evaluation", "Adapter", "Items shared")
        blocks += [
            Lead(openings_text(evidence.openings, evidence.items)),
            table("Table of openings", head, (_earlier(each) for each in evidence.openings)),
        ]
    else:
        blocks.append(Lead("These test items had not been opened before."))
    return Section("access-log", "Openings of the test items", tuple(blocks))


def log_table(openings: Sequence[LoggedAccess]) -> Table:
    """Return all openings of the test split, in the access log's order."""
    head = ("Line", *words("Opened (UTC)", "By", "Evaluation", "Adapter"), "Items", *words("Declared"))
    rows = []
    for each in openings:
        adapter, declared = each.adapter or "one for each fold", each.declared[0]
        against = f"{declared.treatment} against {declared.control}"
        made = (_day(each.time), each.author or "", each.evaluation, adapter)
        rows.append((f"{each.number}", *made, f"{each.items}", against))
    return table("Openings of the test split", head, rows)


def _day(time: str) -> str:
    return time[:16].replace("T", " ")


def _declared(each: Declared) -> str:
    margin = "" if each.margin is None else f", margin {100 * each.margin:g} points, which decides"
    return f"{each.treatment} against {each.control} by {metric_label(each.metric)}{margin}"


def _earlier(each: EarlierAccess) -> Row:
    shared = "not known" if each.shared_items is None else f"{each.shared_items:,}"
    adapter = each.adapter or "one for each fold"
    return row(f"line {each.number}", _day(each.time), each.author or "", each.evaluation, adapter, shared)
