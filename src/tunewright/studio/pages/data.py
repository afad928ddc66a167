"""The dataset's versions, uploaded files, and rows."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response

from tunewright.api.data import AddOptions
from tunewright.core.errors import UserError
from tunewright.data.dedup import cluster_counts
from tunewright.data.review.label_models import excerpt
from tunewright.data.trace import find_row, metadata_by_key
from tunewright.studio.visit import Handlers, Visit

UPLOADS = "uploads"
"""The folder of uploaded files, in the project's."""

_ON_A_PAGE = 50  # rows
_FAULTS = 100  # of a file on its page


def data_page(visit: Visit) -> Response:
    """Show the versions and a form that takes a file."""
    return visit.page("data.html.j2", "Data", versions=visit.project.data.log()[::-1])


def check_page(visit: Visit) -> Response:
    """Show what adding an uploaded file would do."""
    file, options = _uploaded(visit, visit.query), _add_options(visit.query)
    return visit.page(
        "check.html.j2",
        "Data",
        file=file.name,
        options=options,
        checked=visit.project.data.check_files([file], options),
        most=_FAULTS,
    )


def add_file(visit: Visit) -> Response:
    """Add an uploaded file as a new version."""
    file = _uploaded(visit, visit.form)
    added = visit.project.data.add([file], _add_options(visit.form), message=visit.form.get("message", ""))
    state = "is new" if added.created else "has all of these rows already"
    return visit.go("/data", f"Version {added.version.digest[:12]} {state}.")


def _uploaded(visit: Visit, fields: dict[str, str]) -> Path:
    name = fields.get("file", "")
    file = visit.project.folder.root / UPLOADS / name
    if file.name != name or not file.is_file():
        raise UserError(f"There is no uploaded file {name!r}", fix="Upload it on the page Data.")
    return file


def _add_options(fields: dict[str, str]) -> AddOptions:
    return AddOptions(
        skip_bad="skip_bad" in fields, redact="redact" in fields, accept_conflicts="accept_conflicts" in fields
    )


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
    ("GET", "/data"): data_page,
    ("GET", "/data/check"): check_page,
    ("POST", "/data/add"): add_file,
    ("GET", "/rows"): rows_page,
    ("GET", "/rows/{row}"): row_page,
}
