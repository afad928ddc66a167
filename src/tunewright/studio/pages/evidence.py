"""Evaluations: verdict and contrasts, the report, and each item with all answers and prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from starlette.responses import HTMLResponse, Response

from tunewright.core.errors import UserError
from tunewright.data.review.label_models import excerpt
from tunewright.evidence.blocks import evaluation_sections
from tunewright.evidence.files import (
    CHANGES,
    ItemFilter,
    chosen_items,
)
from tunewright.evidence.schema import Evidence, Item
from tunewright.metrics import metric_label
from tunewright.report.items import shown_answer
from tunewright.studio.pages.project import evaluations_of
from tunewright.studio.visit import Handlers, Visit, path_of

_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
_MOST = 100  # evaluations on the list
_ON_A_PAGE = 50  # items


@dataclass(frozen=True)
class _Choice:
    """The filter of a page, and the fields of its form."""

    kept: ItemFilter
    fields: dict[str, str]

    @property
    def query(self) -> str:
        """The fields as a query."""
        return urlencode({name: value for name, value in self.fields.items() if value})


def evidence_list(visit: Visit) -> Response:
    """Show all evaluations with their verdicts."""
    return visit.page("evidence_list.html.j2", "Evidence", evaluations=evaluations_of(visit, _MOST))


def evidence_page(visit: Visit) -> Response:
    """Show an evaluation's verdict and measurements, and the items that a filter keeps."""
    name = visit.place["evaluation"]
    evidence, items = visit.project.evidence(name)
    choice = _choice(visit, evidence)
    chosen = chosen_items(evidence, items, choice.kept)
    pages = max(1, -(-len(chosen) // _ON_A_PAGE))
    asked = visit.query.get("page", "1")
    page = min(int(asked), pages) if asked.isdecimal() and int(asked) > 0 else 1
    verdict = visit.project.verdict(name)
    return visit.page(
        "evidence.html.j2",
        f"Evaluation {name}",
        id=name,
        evidence=evidence,
        headline=verdict.headline,
        verdict=verdict,
        causes=[cause.text for cause in verdict.causes],
        sections=evaluation_sections(evidence),
        choice=choice,
        changes=CHANGES,
        bands=_bands(evidence),
        chosen=chosen[(page - 1) * _ON_A_PAGE : page * _ON_A_PAGE],
        count=len(chosen),
        page=page,
        pages=pages,
        excerpt=excerpt,
    )


def _choice(visit: Visit, evidence: Evidence) -> _Choice:
    """Return the filter of the query.

    Raises:
        UserError: the query names another effect or similarity than the page offers.
    """
    first = ItemFilter.of(evidence.contrasts[0])
    query = visit.query
    fields = {
        "treatment": query.get("treatment") or first.treatment,
        "control": query.get("control") or first.control,
        "change": query.get("change", ""),
        "nearest": query.get("nearest", ""),
    }
    change = next((each for each in CHANGES if each == fields["change"]), None)
    bands = dict(_bands(evidence))
    if (change is None and fields["change"]) or (fields["nearest"] and fields["nearest"] not in bands):
        raise UserError("The page has no such filter", where=evidence.id, fix="Choose one of the lists.")
    limits = bands.get(fields["nearest"])
    return _Choice(ItemFilter(fields["treatment"], fields["control"], change, limits), fields)


def _bands(evidence: Evidence) -> list[tuple[str, tuple[float, float]]]:
    """Return the bands of similarity to the training rows that have items."""
    found = evidence.train_similarity
    return [] if found is None else [(f"{b.low:.1f} to {b.high:.1f}", (b.low, b.high)) for b in found.bands]


def item_page(visit: Visit) -> Response:
    """Show one item: input, references, and every arm's answer with its scores."""
    evidence, items = visit.project.evidence(visit.place["evaluation"])
    number, item = _item(visit, items)
    choice = _choice(visit, evidence)
    numbers = [each for each, _, _ in chosen_items(evidence, items, choice.kept)]
    return visit.page(
        "item.html.j2",
        f"Item {number} of {len(items)}",
        id=visit.place["evaluation"],
        evidence=evidence,
        item=item,
        number=number,
        choice=choice,
        before=max((each for each in numbers if each < number), default=None),
        after=min((each for each in numbers if each > number), default=None),
        answers=[(shown_answer(item, arm, evidence.metric), _scores(item, arm)) for arm in item.answers],
        versions=_versions(evidence),
    )


def _item(visit: Visit, items: list[Item]) -> tuple[int, Item]:
    number = visit.place["number"]
    if not number.isdecimal() or not 1 <= int(number) <= len(items):
        raise UserError(f"There is no item {number!r}", fix=f"Choose a number from 1 to {len(items)}.")
    return int(number), items[int(number) - 1]


def _scores(item: Item, arm: str) -> list[tuple[str, str]]:
    """Return each metric's label with the arm's score, or the reason why there is no score."""
    found = []
    for metric, scores in item.scores.items():
        why = (item.unscored or {}).get(metric, {}).get(arm, "")
        text = f"{scores[arm]:g}" if arm in scores else f"not scored{f': {why}' if why else ''}"
        found.append((metric_label(metric), text))
    return found


def _versions(evidence: Evidence) -> dict[str, str]:
    """Return the model versions that gave each incumbent's frozen answers."""
    compared = evidence.incumbents.compared if evidence.incumbents else ()
    return {f"incumbent-{each.name}": ", ".join(each.versions) for each in compared}


def prompts_page(visit: Visit) -> Response:
    """Show each arm's stored prompt for an item as tokens, and the demonstrations in it."""
    _, items = visit.project.evidence(visit.place["evaluation"])
    number, item = _item(visit, items)
    return visit.page(
        "prompts.html.j2",
        f"Prompts of item {number}",
        id=visit.place["evaluation"],
        number=number,
        back=path_of("evidence", visit.place["evaluation"], str(number)),
        prompts=visit.project.item_prompts(visit.place["evaluation"], item.key),
        excerpt=excerpt,
        turn_text=_turn_text,
    )


def _turn_text(turn: Mapping[str, Any]) -> str:
    """Return what a turn says; a turn with more than a text as JSON."""
    if turn.keys() == {"role", "content"}:
        return str(turn["content"])
    return json.dumps(turn, ensure_ascii=False, indent=1)


def report_page(visit: Visit) -> Response:
    """Show an evaluation's report, which is a page of its own with its styles inside, below links to the studio."""
    name = visit.place["evaluation"]
    text = visit.project.report(name).read_text(encoding="utf-8")
    links = visit.templates.get_template("report_links.html.j2").render(id=name)
    # The file itself has no links out of it.
    return HTMLResponse(
        text.replace("<body>", f"<body>\n{links}", 1), headers={"Content-Security-Policy": _REPORT_POLICY}
    )


HANDLERS: Handlers = {
    ("GET", "/evidence"): evidence_list,
    ("GET", "/evidence/{evaluation}"): evidence_page,
    ("GET", "/evidence/{evaluation}/{number}"): item_page,
    ("GET", "/evidence/{evaluation}/{number}/prompts"): prompts_page,
    ("GET", "/report/{evaluation}"): report_page,
}
