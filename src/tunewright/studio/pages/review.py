"""The review of labels."""

from __future__ import annotations

from starlette.responses import Response

from tunewright.core.errors import UserError
from tunewright.data.review.label_models import excerpt
from tunewright.data.review.report import review_report
from tunewright.data.review.reviews import Verdict
from tunewright.data.review.session import ReviewSession
from tunewright.studio.visit import Handlers, Visit

_VERDICTS: dict[str, Verdict] = {"right": "right", "wrong": "wrong", "skip": "skip"}


def review_page(visit: Visit) -> Response:
    """Show the next row of the sample, or the result."""
    review = _review(visit)
    card = review.next()
    report = review_report(visit.project.folder.dataset, visit.version)
    neighbors = [] if card is None else visit.neighbors.of(card.member.key)
    return visit.page(
        "review.html.j2",
        "Review",
        status=review.status,
        card=card,
        neighbors=neighbors,
        report=report,
        excerpt=excerpt,
    )


def judge_row(visit: Visit) -> Response:
    """Record a verdict on the row that the form was made for."""
    review, action = _review(visit), visit.form.get("action", "")
    if action == "undo":
        return visit.go("/review", "Taken back." if review.undo() is not None else "There is nothing to take back.")
    card = review.next()
    if card is None or card.member.key != visit.form.get("key"):
        # A second tab, the terminal, or the same form sent twice.
        return visit.go("/review", "That row was judged meanwhile. Nothing was recorded for it now.")
    if action == "edit":
        return visit.go("/review", review.edit(card, visit.form.get("output")))
    if action not in _VERDICTS:
        raise UserError(f"Unknown verdict {action!r}", fix="Use the buttons of the page.")
    review.judge(card, _VERDICTS[action])
    return visit.go("/review")


def apply_edits(visit: Visit) -> Response:
    """Make a new version with the edited answers."""
    made = visit.project.data.apply_reviews(message=visit.form.get("message", ""))
    return visit.go("/review", f"New version {made.version.digest[:12]}: {made.version.message}")


def _review(visit: Visit) -> ReviewSession:
    """Return the reviewer's session on the current version."""
    digest = visit.version.digest
    kept, place = visit.cache.reviews, (digest, visit.session.reviewer)
    if place in kept:
        kept[place].refresh()
    else:
        for old in [each for each in kept if each[0] != digest]:
            del kept[old]
        kept[place] = visit.project.data.review(visit.session.reviewer)
    return kept[place]


HANDLERS: Handlers = {
    ("GET", "/review"): review_page,
    ("POST", "/review"): judge_row,
    ("POST", "/review/apply"): apply_edits,
}
