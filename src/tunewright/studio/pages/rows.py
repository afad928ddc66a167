"""The rows of the current version."""

from __future__ import annotations

from itertools import chain, zip_longest
from urllib.parse import urlencode

from starlette.responses import Response

from tunewright.core.errors import UserError
from tunewright.data.dedup import cluster_counts
from tunewright.data.review.label_models import excerpt
from tunewright.data.row_index import FLAGS, RowQuery, row_history
from tunewright.data.splits import SPLITS
from tunewright.data.trace import find_row
from tunewright.studio.pages.review import next_row, stored_searches
from tunewright.studio.visit import Handlers, Visit, path_of

_ON_A_PAGE = 50  # rows
_KEYS = {"q": "words", "split": "split", "cluster": "cluster", "source": "source", "flag": "flag"}
"""Parameters of the address, and the fields of `RowQuery` that they set."""


def rows_page(visit: Visit) -> Response:
    """Show the rows of the current version that match a search and filters."""
    given = {name: visit.query.get(name, "").strip() for name in _KEYS}
    query = RowQuery(**{_KEYS[name]: value for name, value in given.items()})
    for value, known, what in ((query.split, SPLITS, "split"), (query.flag, FLAGS, "flag")):
        if value and value not in known:
            raise UserError(f"Unknown {what} {value!r}", fix=f"Choose from {', '.join(known)}.")
    suspects = _suspects(visit) if query.flag == "suspect" else {}
    rows = visit.rows.find(query, (suspects or {}).keys())
    if suspects:  # the most suspicious first
        rank = {key: place for place, key in enumerate(suspects)}
        rows.sort(key=lambda row: rank[row.key])
    pages = max(1, -(-len(rows) // _ON_A_PAGE))
    number = visit.query.get("page", "1")
    page = min(int(number), pages) if number.isdecimal() and int(number) > 0 else 1
    shown = rows[(page - 1) * _ON_A_PAGE : page * _ON_A_PAGE]
    return visit.page(
        "rows.html.j2",
        "Rows",
        rows=[(row, visit.rows.flags_of(row), (suspects or {}).get(row.key, "")) for row in shown],
        count=len(rows),
        page=page,
        pages=pages,
        given=given,
        # The next and the previous page have the same filters.
        address=urlencode({name: value for name, value in given.items() if value}),
        splits=SPLITS,
        sources=visit.rows.sources,
        flags=FLAGS,
        searched=suspects is not None,
        excerpt=excerpt,
    )


def _suspects(visit: Visit) -> dict[str, str] | None:
    """Return the reason for each suspect of all stored searches; None if they have not been looked for."""
    searches = stored_searches(visit)
    if not searches:
        return None
    reasons: dict[str, str] = {}
    # The most suspicious of each search first.
    for each in chain.from_iterable(zip_longest(*searches.values())):
        if each is not None:
            reasons.setdefault(each.key, each.detail)
    return reasons


def row_page(visit: Visit) -> Response:
    """Show one row: its conversation, tokens with the loss mask, history, and the rows most similar to it."""
    from tunewright.chat.inspection import view

    member = find_row(visit.project.folder.dataset, visit.version, visit.place["row"])
    chat = visit.chat
    history = row_history(visit.project.folder, visit.version, member.key, visit.places)
    mine = (visit.session.reviewer, visit.version.digest)
    return visit.page(
        "row.html.j2",
        f"Row {member.key[:12]}",
        member=member,
        flags=visit.rows.flags_of(member),
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
