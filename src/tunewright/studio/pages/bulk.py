"""One change of all rows that match a filter: leave them out, or give them one answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from starlette.responses import Response

from tunewright.core.errors import UserError
from tunewright.core.text import count_of
from tunewright.data.review.edits import require_enough
from tunewright.data.review.label_models import excerpt
from tunewright.data.review.session import ReviewItem, ReviewSession
from tunewright.studio.pages.review import ONE_ROW, labels_of, review_of
from tunewright.studio.pages.rows import filter_texts, found_rows, given_filters, rows_table
from tunewright.studio.visit import Handlers, Visit, in_form

if TYPE_CHECKING:
    from tunewright.data.versions import Member

_SHOWN = 20  # rows of the question


def question_page(visit: Visit) -> Response:
    """Ask for the change of all rows that match the filters, with their number."""
    given, output = given_filters(visit.query), _answer(visit)
    members, suspects = found_rows(visit, given)
    changing = _changing(visit, members)
    filters = {name: value for name, value in given.items() if value}
    return visit.page(
        "bulk.html.j2",
        "Rows",
        filters=filters,
        address=urlencode(filters),
        texts=filter_texts(given),
        output=output,
        count=len(changing),
        unchanged=len(members) - len(changing),
        seen=_digest(changing),
        before=visit.form.get("count", ""),
        rows=rows_table(visit, changing[:_SHOWN], suspects),
        most=_SHOWN,
    )


def _answer(visit: Visit) -> str | None:
    """Return the answer that the rows get, as the address or the form says; None: they are left out."""
    change, output = visit.query.get("change"), visit.query.get("output", "")
    if change not in ("leave-out", "edit"):
        raise UserError(f"Unknown change {change!r}", fix="Use the buttons of the page Rows.")
    if not filter_texts(given_filters(visit.query)):
        raise UserError("No filter chooses rows", fix="Choose a filter on the page Rows first.")
    if change == "leave-out":
        return None
    if output not in labels_of(visit):
        raise UserError(f"No row has the answer {excerpt(output)}", fix="Choose one of the list.")
    return output


def _changing(visit: Visit, members: Sequence[Member]) -> list[Member]:
    """Return the rows that a change would change: not the mix-in, and no row that is changed like this already."""
    output, review = _answer(visit), _review(visit)
    wanted = ("leave-out" if output is None else "edit", output)
    found = []
    for member in members:
        mine = review.verdict(member.key)
        done = mine is not None and (mine.verdict, mine.output) == wanted
        if not member.mixed and not done and member.example.output != output:
            found.append(member)
    return found


def _review(visit: Visit) -> ReviewSession:
    review = review_of(visit, ONE_ROW)
    assert review is not None, "only suspects need a search first"
    return review


def _digest(members: Sequence[Member]) -> str:
    return hashlib.sha256("".join(sorted(member.key for member in members)).encode()).hexdigest()


def change_rows(visit: Visit) -> Response:
    """Record the change as the reviewer's verdict on each row, if the rows are those of the question."""
    visit.query = {name: value for name, value in visit.form.items() if value}
    output, review = _answer(visit), _review(visit)
    changing = _changing(visit, found_rows(visit, given_filters(visit.query))[0])
    if _digest(changing) != visit.form.get("seen"):
        return question_page(visit)
    for member in () if output is None else changing:
        if fault := review.edit_fault(ReviewItem(member, 0), output):
            raise UserError(f"Row {member.key[:12]}: {fault} Nothing was changed", fix="Leave it out of the filter.")
    keys = [member.key for member in changing]
    if output is None:
        gone = set(keys)
        require_enough((member for member in visit.version.members if member.key not in gone), "leave out")
    review.judge_together(keys, "leave-out" if output is None else "edit", output)
    disputed = sum(map(review.log.disputed, keys))
    done = "left out" if output is None else f"the answer is {excerpt(output)}"
    said = f"{count_of(len(keys), 'row')}: {done} in the next version."
    others = (
        f"Unchanged until settled, because other reviewers disagree: {count_of(disputed, 'row')}." if disputed else ""
    )
    filters = {name: value for name, value in given_filters(visit.query).items() if value}
    return visit.go(f"/rows?{urlencode(filters)}", said, others)


def undo_change(visit: Visit) -> Response:
    """Take the newest change of several rows back."""
    undone = _review(visit).undo_together(visit.form.get("when", ""))
    return visit.go("/rows", f"Taken back: {count_of(undone, 'row')}." if undone else "There is nothing to take back.")


HANDLERS: Handlers = {
    ("GET", "/rows/change"): question_page,
    ("POST", "/rows/change"): in_form("/rows/change", question_page, change_rows),
    ("POST", "/rows/undo"): undo_change,
}
