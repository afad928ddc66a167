"""The rows of the current version."""

from __future__ import annotations

from starlette.responses import Response

from tunewright.data.dedup import cluster_counts
from tunewright.data.review.label_models import excerpt
from tunewright.data.trace import find_row, metadata_by_key
from tunewright.studio.visit import Handlers, Visit

_ON_A_PAGE = 50  # rows


def rows_page(visit: Visit) -> Response:
    """Show the rows of the current version that match a search and a split."""
    words = visit.query.get("q", "").casefold().split()
    split = visit.query.get("split", "")
    rows = [
        member
        for member, text in zip(visit.version.members, visit.cache.texts, strict=True)
        if (not split or member.split == split) and all(word in text for word in words)
    ]
    pages = max(1, -(-len(rows) // _ON_A_PAGE))
    number = visit.query.get("page", "1")
    page = min(int(number), pages) if number.isdecimal() and int(number) > 0 else 1
    shown = rows[(page - 1) * _ON_A_PAGE : page * _ON_A_PAGE]
    return visit.page(
        "rows.html.j2",
        "Rows",
        rows=shown,
        count=len(rows),
        page=page,
        pages=pages,
        q=visit.query.get("q", ""),
        split=split,
        excerpt=excerpt,
    )


def row_page(visit: Visit) -> Response:
    """Show one row: its conversation, its tokens with the loss mask, and the rows most similar to it."""
    from tunewright.chat.inspection import view

    member = find_row(visit.project.folder.dataset, visit.version, visit.place["row"])
    chat = visit.chat
    return visit.page(
        "row.html.j2",
        f"Row {member.key[:12]}",
        member=member,
        metadata=metadata_by_key(visit.project.folder.dataset, visit.version.manifest).get(member.key, {}),
        counts=cluster_counts(visit.version, member),
        tokens=[view(chat, row) for row in chat.rows(member.example.messages)],
        neighbors=[] if member.mixed else visit.neighbors.of(member.key),
        excerpt=excerpt,
    )


HANDLERS: Handlers = {
    ("GET", "/rows"): rows_page,
    ("GET", "/rows/{row}"): row_page,
}
