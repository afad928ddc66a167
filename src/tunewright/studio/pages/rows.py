"""The rows of the dataset: filters, sorting, and each row's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from starlette.responses import Response

from tunewright.core.errors import UserError
from tunewright.core.text import count_of
from tunewright.data.browse import DISPUTED, FLAGS, NO_VERDICT, SORTS, RowQuery, row_history
from tunewright.data.dedup import cluster_counts
from tunewright.data.review.label_models import excerpt
from tunewright.data.review.reviews import VERDICTS
from tunewright.data.splits import SPLITS
from tunewright.data.trace import find_row
from tunewright.render.blocks import Cell, Table, table, words
from tunewright.studio.pages.review import next_row, stored_searches
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
_CHOICES = {"split": SPLITS, "flag": FLAGS, "verdict": (*VERDICTS, DISPUTED, NO_VERDICT), "sort": SORTS}


def rows_page(visit: Visit) -> Response:
    """Show the rows of the current version that match a search and filters."""
    given = {name: visit.query.get(name, "").strip() for name in _KEYS}
    for name, known in _CHOICES.items():
        if given[name] and given[name] not in known:
            raise UserError(f"Unknown {name} {given[name]!r}", fix=f"Choose from {', '.join(known)}.")
    query = RowQuery(**{_KEYS[name]: value for name, value in given.items()})
    searches = stored_searches(visit) if query.flag == "suspect" else {}
    suspects: dict[str, str] = {}
    # The most suspicious of each search first.
    for each in chain.from_iterable(zip_longest(*searches.values())):
        if each is not None:
            suspects.setdefault(each.key, each.detail)
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
        rows=_rows_table(visit, shown, suspects),
        **numbers,
        given=given,
        # The next and the previous page have the same filters.
        address=urlencode(filters),
        choices=_CHOICES,
        answers=visit.rows.answers,
        sources=visit.rows.sources,
        searched=bool(searches) or query.flag != "suspect",
        hints=hints,
    )


def _rows_table(visit: Visit, members: Sequence[Member], suspects: Mapping[str, str]) -> Table:
    rows = []
    for member in members:
        reason = suspects.get(member.key)
        flags = [*visit.rows.flags_of(member, visit.reviews), *([f"suspect: {reason}"] if reason else [])]
        texts = map(excerpt, (member.example.input_text, member.example.output))
        name = Cell(f"Row {visit.rows.numbers[member.key]}", note=member.key[:12], link=path_of("rows", member.key))
        rows.append((name, member.split, *texts, ", ".join(flags)))
    return table("Rows", words("Row", "Split", "Question", "Answer", "Flags"), rows)


def row_link(member: Member, text: str) -> Cell:
    """Return a cell that leads to a row's page."""
    return Cell(text, link=path_of("rows", member.key))


def row_page(visit: Visit) -> Response:
    """Show one row: its conversation, tokens with the loss mask, history, and the rows most similar to it."""
    from tunewright.chat.inspection import view

    member = find_row(visit.project.folder.dataset, visit.version, visit.place["row"])
    chat = visit.chat
    history = row_history(visit.project.folder, visit.version, member.key, visit.places)
    mine = (visit.session.reviewer, visit.version.digest)
    return visit.page(
        "row.html.j2",
        f"Row {visit.rows.numbers.get(member.key, member.key[:12])}",
        member=member,
        flags=visit.rows.flags_of(member, visit.reviews),
        metadata=visit.rows.metadata.get(member.key, {}),
        counts=cluster_counts(visit.version, member),
        tokens=[view(chat, row) for row in chat.rows(member.example.messages)],
        history=history,
        mine=any((each.reviewer, each.version) == mine for each in history.reviews),
        neighbors=[] if member.mixed else visit.neighbors.of(member.key),
        excerpt=excerpt,
    )


def take_back(visit: Visit) -> Response:
    """Withdraw the reviewer's verdict on a row of the current version, and show the review, which offers it again."""
    member = find_row(visit.project.folder.dataset, visit.version, visit.place["row"])
    review = visit.project.data.review(visit.session.reviewer, version=visit.version)
    undone = review.undo(member.key)
    if undone is None:
        return visit.go(path_of("rows", member.key), "There is no verdict of yours on this row to take back.")
    shown = next_row(visit, "sample", review)
    if shown is None or shown.member.key != member.key:
        return visit.go(path_of("rows", member.key), "Taken back. The review offers the row again in its turn.")
    return visit.go("/review", "Taken back. Judge the row again, or edit its answer.")


HANDLERS: Handlers = {
    ("GET", "/rows"): rows_page,
    ("GET", "/rows/{row}"): row_page,
    ("POST", "/rows/{row}/take-back"): take_back,
}
