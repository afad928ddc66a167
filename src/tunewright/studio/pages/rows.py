"""The rows of the dataset: filters, sorting, and each row's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from starlette.responses import Response

from tunewright.annotation import LEASE_S
from tunewright.core.csv import sheet
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.core.text import count_of
from tunewright.data.browse import DISPUTED, FLAGS, NO_VERDICT, SORTS, RowQuery, row_history, verdicts_on
from tunewright.data.dedup import cluster_counts
from tunewright.data.review.label_models import Suspect, excerpt
from tunewright.data.review.reviews import CHANGES, VERDICTS, event_digest
from tunewright.data.review.session import ReviewItem, ReviewSession
from tunewright.data.splits import SPLITS
from tunewright.data.trace import find_row
from tunewright.data.versions.diff import word_changes
from tunewright.render.blocks import Cell, Table, table, words
from tunewright.studio.computed import row_tokens
from tunewright.studio.pages.review import ONE_ROW, Typed, judge_row, judging, labels_of, review_of, searches
from tunewright.studio.visit import Handlers, Visit, path_of

if TYPE_CHECKING:
    from tunewright.data.versions import Member

_ON_A_PAGE = 50  # rows
_KEYS = {
    "q": "words",
    "answer": "answer",
    "verdict": "verdict",
    "flag": "flag",
    "split": "split",
    "source": "source",
    "cluster": "cluster",
    "sort": "sort",
}
"""Parameters of the address, and the fields of `RowQuery` that they set."""
_NAMES = {"q": "Search", "source": "File"}
"""Names of filters on the page, where they are not the parameter's."""
_COLUMNS = ("key", "number", "split", "input", "answer", "verdicts", "flags")
"""Columns of the CSV file; `tunewright data remove --keys` reads the first."""
_FILES = {"csv": "text/csv", "jsonl": "application/jsonl"}
"""Media types of the files of rows, by their endings."""
_CHOICES = {"split": SPLITS, "flag": FLAGS, "verdict": (*VERDICTS, DISPUTED, NO_VERDICT), "sort": SORTS}


def rows_page(visit: Visit) -> Response:
    """Show the rows of the current version that match a search and filters."""
    given = given_filters(visit.query)
    query = _query(given)
    found_by = searches(visit) if query.flag == "suspect" else {}
    suspects = _reasons(found_by)
    rows = visit.rows.find(query, visit.reviews, suspects)
    shown, numbers = visit.shown(rows, _ON_A_PAGE)
    filters = {name: value for name, value in given.items() if value}
    hints = []
    for name in () if rows else filters:
        if name != "sort" and (found := visit.rows.find(replace(query, **{_KEYS[name]: ""}), visit.reviews, suspects)):
            rest = urlencode({each: value for each, value in filters.items() if each != name})
            what = f"{_NAMES.get(name, name.capitalize())} “{filters[name]}”"
            hints.append((rest, f"Without {what}: {count_of(len(found), 'row')}"))
    return visit.page(
        "rows.html.j2",
        "Rows",
        rows=rows_table(visit, shown, suspects),
        **numbers,
        given=given,
        # The next and the previous page, and the files, have the same filters.
        address=urlencode(filters),
        choices=_CHOICES,
        answers=visit.rows.answers,
        sources=visit.rows.sources,
        filtered=bool(filter_texts(given)),
        labels=labels_of(visit),
        together=visit.reviews.changed_together(visit.session.reviewer, visit.version.digest),
        searched=bool(found_by) or query.flag != "suspect",
        hints=hints,
    )


def rows_file(visit: Visit) -> Response:
    """Send all rows that match a search and filters: a CSV file for a spreadsheet, or JSON lines of chat rows."""
    ending = visit.place["ending"]
    if ending not in _FILES:
        raise UserError(f"Rows cannot be downloaded as {ending!r}", fix=f"Choose from {', '.join(_FILES)}.")
    found, suspects = found_rows(visit, given_filters(visit.query))
    if ending == "csv":
        text = sheet(_COLUMNS, (_cells(visit, member, suspects) for member in found))
    else:
        text = "".join(f"{canonical_json(member.example.as_row())}\n" for member in found)
    name = f"rows-{visit.version.digest[:12]}.{ending}"
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(text, media_type=_FILES[ending], headers=headers)


def found_rows(visit: Visit, given: Mapping[str, str]) -> tuple[list[Member], dict[str, str]]:
    """Return the rows that match the filters, and the reasons of suspects if the filters need them."""
    query = _query(given)
    suspects = _reasons(searches(visit, wait=True)) if query.flag == "suspect" else {}
    return visit.rows.find(query, visit.reviews, suspects), suspects


def given_filters(fields: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of an address or a form that choose rows; an absent one is empty."""
    given = {name: fields.get(name, "").strip() for name in _KEYS}
    for name, known in _CHOICES.items():
        if given[name] and given[name] not in known:
            raise UserError(f"Unknown {name} {given[name]!r}", fix=f"Choose from {', '.join(known)}.")
    return given


def filter_texts(given: Mapping[str, str]) -> list[str]:
    """Return the filters that choose rows, in words."""
    return [
        f"{_NAMES.get(name, name.capitalize())} “{value}”" for name, value in given.items() if value and name != "sort"
    ]


def _query(given: Mapping[str, str]) -> RowQuery:
    return RowQuery(**{_KEYS[name]: value for name, value in given.items()})


def _reasons(searches: Mapping[str, Sequence[Suspect]]) -> dict[str, str]:
    """Return each suspect's reason by its key, the most suspicious of each search first."""
    reasons: dict[str, str] = {}
    for each in chain.from_iterable(zip_longest(*searches.values())):
        if each is not None:
            reasons.setdefault(each.key, each.detail)
    return reasons


def _flags(visit: Visit, member: Member, suspects: Mapping[str, str]) -> str:
    reason = suspects.get(member.key)
    return ", ".join([*visit.rows.flags_of(member, visit.reviews), *([f"suspect: {reason}"] if reason else [])])


def _cells(visit: Visit, member: Member, suspects: Mapping[str, str]) -> tuple[str, ...]:
    """Return a row of the CSV file: see `_COLUMNS`."""
    example, number = member.example, visit.rows.numbers[member.key]
    verdicts = ", ".join(sorted(verdicts_on(visit.reviews, member.key) - {NO_VERDICT}))
    texts = (example.input_text, example.output)
    return (member.key, str(number), member.split, *texts, verdicts, _flags(visit, member, suspects))


def rows_table(visit: Visit, members: Sequence[Member], suspects: Mapping[str, str]) -> Table:
    """Return the table of rows, each with a link to its page."""
    rows = []
    for member in members:
        texts = map(excerpt, (member.example.input_text, member.example.output))
        name = Cell(f"Row {visit.rows.numbers[member.key]}", note=member.key[:12], link=path_of("rows", member.key))
        flags = ", ".join(filter(None, [_flags(visit, member, suspects), _coming(visit, member)]))
        rows.append((name, member.split, *texts, flags))
    return table("Rows", words("Row", "Split", "Input", "Answer", "Flags"), rows)


def _coming(visit: Visit, member: Member) -> str:
    """Return what the next version changes in a row; empty for nothing."""
    judged = visit.reviews.current_verdicts(member.key).values()
    changes = {each.output for each in judged if each.verdict in CHANGES}
    if not changes or member.mixed or visit.reviews.disputed(member.key):
        return ""
    (output,) = changes
    return "next version: " + ("left out" if output is None else excerpt(output))


def row_link(member: Member, text: str) -> Cell:
    """Return a cell that leads to a row's page."""
    return Cell(text, link=path_of("rows", member.key))


def row_page(visit: Visit) -> Response:
    """Show one row: its conversation, the review of it, tokens with the loss mask, history, and similar rows."""
    member, review = _row(visit)
    card = None
    if not member.mixed:
        card = visit.leases.next(review, visit.session.form_token, ONE_ROW, member.key)
    return _show(visit, ONE_ROW, review, card, Typed())


def judge(visit: Visit) -> Response:
    """Record the reviewer's input on the row, unless somebody judged it since the page was made."""
    member, review = _row(visit)
    fresh = not member.mixed and visit.form.get("seen") == _seen(review, member.key)
    return judge_row(visit, ONE_ROW, review, review.item(member.key) if fresh else None, _show)


def _row(visit: Visit) -> tuple[Member, ReviewSession]:
    member = find_row(visit.project.folder.dataset, visit.version, visit.place["row"])
    review = review_of(visit, ONE_ROW)
    assert review is not None, "only suspects need a search first"
    return member, review


def _seen(review: ReviewSession, key: str) -> str:
    """Return which verdicts on a row a page shows."""
    return " ".join(sorted(event_digest(judged) for judged in review.log.current_verdicts(key).values()))


def _show(visit: Visit, queue: str, review: ReviewSession, card: ReviewItem | None, typed: Typed) -> Response:
    member, _ = _row(visit)
    return visit.page(
        "row.html.j2",
        f"Row {visit.rows.numbers.get(member.key, member.key[:12])}",
        member=member,
        flags=visit.rows.flags_of(member, visit.reviews),
        metadata=visit.rows.metadata.get(member.key, {}),
        counts=cluster_counts(visit.version, member),
        tokens=visit.computed(row_tokens, member.key),
        history=row_history(visit.project.folder, visit.version, member.key, visit.places),
        **judging(visit, queue, review, card, typed),
        seen=_seen(review, member.key),
        waiting=LEASE_S // 60,
        word_changes=word_changes,
        neighbors=[] if member.mixed else visit.neighbors.of(member.key),
        excerpt=excerpt,
    )


HANDLERS: Handlers = {
    ("GET", "/rows"): rows_page,
    ("GET", "/rows.{ending}"): rows_file,
    ("GET", "/rows/{row}"): row_page,
    ("POST", "/rows/{row}"): judge,
}
