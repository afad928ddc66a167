"""Section on earlier accesses to the test items, and on the contrasts declared beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.evidence.logged_access import Declared, EarlierAccess, LoggedAccess, openings_text
from tunewright.evidence.schema import Evidence
from tunewright.metrics import metric_label
from tunewright.render.blocks import Block, Lead, Row, Section, Table, row, table, words


def section(evidence: Evidence) -> Section | None:
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
