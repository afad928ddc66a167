"""The review of labels: the random sample, suspects, second reviews, conflicts and edits, each on a page of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.responses import Response

from tunewright.annotation import LEASE_S
from tunewright.core.errors import UserError
from tunewright.core.text import count_of
from tunewright.data.examples import class_like, find_labels
from tunewright.data.options import ReviewOptions
from tunewright.data.review.edits import pending_edits
from tunewright.data.review.label_models import Suspect, excerpt
from tunewright.data.review.report import ReviewReport, review_report
from tunewright.data.review.reviews import read_reviews
from tunewright.data.review.session import ReviewItem, ReviewSession
from tunewright.data.review.suspects import FOLDER as SUSPECTS
from tunewright.data.versions.diff import short_changes, word_changes
from tunewright.render.blocks import table, words
from tunewright.studio import computed
from tunewright.studio.access import ChangedText, RefusedVerdict
from tunewright.studio.visit import Handlers, Visit, in_form, path_of, stamps, verdict_of
from tunewright.studio.words import version_name

_ON_A_PAGE = 100  # edits or conflicts
_ROW_S = 8  # seconds for a verdict on a short row
ONE_ROW = "row"
"""The review of one row, on its page."""
_MOST_LABELS = 50
"""Different answers that get a key each."""


@dataclass(frozen=True)
class Queue:
    """A choice of rows to review, with its own page: its path, its name, and what it is for."""

    path: str
    name: str
    about: str


_QUEUES = {
    "sample": Queue(
        "/review", "Random sample", "Rows drawn at random. They alone decide whether the version is accepted."
    ),
    "suspects": Queue(
        "/review/suspects",
        "Suspects",
        "The rows most likely wrong, worst first. They say nothing about the other rows.",
    ),
    "second": Queue(
        "/review/second", "Second review", "Rows that others have judged, without their verdicts, to measure agreement."
    ),
    "conflicts": Queue(
        "/review/conflicts",
        "Conflicts",
        "Rows on which you and others disagree. A row is settled when all its reviewers agree.",
    ),
}


def review_page(visit: Visit) -> Response:
    """Show the next row of a queue, or its result."""
    queue = _queue(visit)
    review = review_of(visit, queue)
    if review is None:
        found = next((name for name in reversed(searches(visit)) if name), "")
        if found and not _adapter(visit, queue):
            return visit.go(f"{_QUEUES[queue].path}?{urlencode({'adapter': found})}")
        judges = _judges(visit)
        return visit.page(
            "suspects.html.j2",
            "Review",
            queues=_QUEUES.values(),
            queue=_QUEUES[queue],
            judges=judges,
            # Without an adapter, only the base can rank answers that no other row has.
            chosen=_adapter(visit, queue) or ("base" if len(judges) == 2 else ""),
            running=visit.jobs.running(),
        )
    return _show(visit, queue, review, next_row(visit, queue, review), Typed())


@dataclass(frozen=True)
class Typed:
    """The texts that a reviewer typed on a row and has not saved; None where no text was typed."""

    draft: str | None = None
    """An edited answer."""
    note: str | None = None
    new_label: str = ""
    """An edited answer that no row has, and that is saved if it is sent again."""


Show = Callable[[Visit, str, ReviewSession, ReviewItem | None, Typed], Response]
"""Returns the page of a row in a queue."""


def _show(visit: Visit, queue: str, review: ReviewSession, card: ReviewItem | None, typed: Typed) -> Response:
    key = "" if card is None else card.key
    stored = "" if card is None else card.member.example.output
    answer = None if card is None else visit.answers.of(key, visit.session.reviewer)
    said = review.log.current_verdicts(key) if review.conflicts else {}
    last = review.latest()
    return visit.page(
        "review.html.j2",
        "Review",
        queues=_QUEUES.values(),
        queue=_QUEUES[queue],
        adapter=_adapter(visit, queue),
        status=review.status,
        left=_left(review),
        last=last,
        last_note=last and review.note_on(last.key),
        last_output=last and review.members[last.key].example.output,
        word_changes=word_changes,
        unjudged=len(review.members.keys() - {key for key in review.log.stacks if review.log.finding(key)}),
        ahead=review.ahead,
        **judging(visit, queue, review, card, typed),
        waiting=LEASE_S // 60 if card is None and review.next() is not None else 0,
        verdicts=[
            (
                name,
                judged.verdict,
                word_changes(stored, judged.output or stored),
                review.log.notes.get(key, {}).get(name),
            )
            for name, judged in sorted(said.items())
        ],
        answer=answer,
        answer_changes=None if answer is None else word_changes(stored, answer.text),
        neighbors=[] if card is None else visit.neighbors.of(key),
        report=review_report(visit.project.folder.dataset, visit.version),
        judges=_judges(visit) if queue == "suspects" else [],
        running=visit.jobs.running() if queue == "suspects" else None,
        excerpt=excerpt,
    )


def judging(visit: Visit, queue: str, review: ReviewSession, card: ReviewItem | None, typed: Typed) -> dict[str, Any]:
    """Return what the buttons and fields of a row show."""
    draft = typed.draft
    return {
        "card": card,
        "mine": None if card is None else review.verdict(card.key),
        "keys": [each for each in review.verdict_keys if queue != ONE_ROW or each[1] != "skip"],
        "draft": review.draft(card) if draft is None and card is not None else draft,
        "changes": None if draft is None or card is None else word_changes(card.member.example.output, draft),
        "note": review.note_on("" if card is None else card.key) if typed.note is None else typed.note,
        "labels": [] if card is None else labels_of(visit),
        "new_label": typed.new_label,
        "place": _place(visit, queue),
    }


def next_row(visit: Visit, queue: str, review: ReviewSession) -> ReviewItem | None:
    """Return the next row, leased to this session where one verdict settles a row."""
    if queue not in ("sample", "suspects"):
        return review.next()
    return visit.leases.next(review, visit.session.form_token, queue)


def _left(review: ReviewSession) -> str:
    """Return how many rows are left: in the sample, the fewest until the verdict."""
    if review.conflicts:
        return f"{review.needed:,} to settle"
    if review.outcome is None or review.second:
        return f"{review.needed:,} left"
    if review.outcome.decision != "continue" and not review.needed:
        return f"Version {review.outcome.decision}"
    if not review.needed:
        return "A skipped or disputed row has to be settled for the verdict"
    if not review.outcome.checked:
        return f"At least {review.needed:,} until the verdict, about {review.needed * _ROW_S / 60:.0f} minutes"
    return f"At least {review.needed:,} more until the verdict"


def judge_next(visit: Visit) -> Response:
    """Record the reviewer's input on a row of a queue."""
    queue = _queue(visit)
    review = review_of(visit, queue)
    if review is None:
        return visit.go(_place(visit, queue))
    if visit.form.get("action") == "again":
        visit.cache.reviews.pop(_kept_as(visit, queue))
        return visit.go(_place(visit, queue))
    return judge_row(visit, queue, review, review.open_item(visit.form.get("key", "")), _show)


def judge_row(visit: Visit, queue: str, review: ReviewSession, card: ReviewItem | None, show: Show) -> Response:
    """Record the reviewer's input on the row that the form was made for; ``show`` returns the form's page."""
    # A page that shows the form again is the queue's.
    action, back = visit.form.get("action", ""), _place(visit, queue)
    visit.path = back
    output, note = _typed(visit, review)
    if card is None and (action != "undo" or output or note):
        # Another session, a second tab, the terminal, or the same form sent twice.
        text = "That row was judged meanwhile. Nothing was recorded for it now."
        typed = [each for each in (output, note) if each]
        return visit.go(back, RefusedVerdict(text, visit.form.get("key", ""), typed))
    said = ""
    if card is not None and note is not None:
        said = review.note(card, note)
        if review.note_on(card.key) != note.strip():
            return _refuse(visit, "note", said, partial(show, visit, queue, review, card, Typed(output, note)))
    if action == "undo" and output is None:
        of_row = visit.form.get("key", "") if queue == ONE_ROW else None
        last = review.latest() if of_row is None else review.verdict(of_row)
        undone = review.undo(of_row)
        if last is None or undone is None:
            return visit.go(back, "There is nothing to take back.")
        shown = undone if queue == ONE_ROW else next_row(visit, queue, review)
        elsewhere = ", which is not next in this list" if shown is None or shown.key != undone.key else ""
        name = visit.row_name(undone.key)
        return visit.go(back, f"Taken back: {last.verdict} on {name[0].lower()}{name[1:]}{elsewhere}.")
    assert card is not None
    label = visit.form.get("label")
    if label is not None and output is None:
        return visit.go(back, review.edit(card, label))
    # An edited row is a wrong one, and its text says more.
    if action in ("edit", "preview") or (action == "wrong" and output is not None and output.strip()):
        return _edited(visit, queue, review, card, show)
    verdict = None if action in ("undo", "note") or label is not None else verdict_of(review, action)
    if output is not None and action != "wrong":
        visit.session.messages += [said] if said else []
        unsaved = "No verdict was recorded: you changed the answer. Save the edit (Ctrl Enter) or cancel it (c)."
        again = partial(show, visit, queue, review, card, Typed(output))
        return again() if action == "note" else _refuse(visit, "output", unsaved, again)
    if verdict is not None:
        review.judge(card, verdict)
        said = f"Recorded: {verdict}." if queue == ONE_ROW else ""
    return visit.go(back, said)


def labels_of(visit: Visit) -> list[str]:
    """Return the version's different answers in alphabetical order, if they are few classes."""
    version = visit.version
    outputs = (member.example.output for member in version.domain)
    labels = visit.cache.once("labels", version.digest, lambda: find_labels(outputs))
    return sorted(labels) if len(labels) <= _MOST_LABELS else []


def _typed(visit: Visit, review: ReviewSession) -> tuple[str | None, str | None]:
    """Return the edited answer and the note that a form sends; None where they are as shown."""
    key, output, note = (visit.form.get(name) for name in ("key", "output", "note"))
    member = review.members.get(key or "")
    if member is not None:
        shown = (member.example.output, review.draft(ReviewItem(member, 0)))
        # Browsers send the text of a field with other line ends, and without NUL.
        if output in [re.sub("\r\n?", "\n", text).replace("\0", "\ufffd") for text in shown]:
            output = None
        if note is not None and note.strip() == review.note_on(member.key):
            note = None
    return output, note


def _edited(visit: Visit, queue: str, review: ReviewSession, card: ReviewItem, show: Show) -> Response:
    """Show the differences of an edited answer, or save it; a text that cannot be saved stays in the form."""
    stored, output = card.member.example.output, visit.form.get("output", "")
    if visit.form["action"] == "preview":
        return show(visit, queue, review, card, Typed(output))
    labels = labels_of(visit)
    if refused := review.edit_fault(card, output):
        return _refuse(visit, "output", refused, partial(show, visit, queue, review, card, Typed(output)))
    if labels and output.strip() not in labels and visit.form.get("new_label", "").split() != output.split():
        asked = f"No row has the answer {excerpt(output)}. To add it, save the edit again."
        typed = Typed(output, new_label=output.strip())
        return _refuse(visit, "output", asked, partial(show, visit, queue, review, card, typed))
    review.edit(card, output)
    return visit.go(_place(visit, queue), ChangedText("Edit saved:", short_changes(stored, output)))


def _refuse(visit: Visit, field: str, text: str, show: Callable[[], Response]) -> Response:
    """Show the page of a form that was refused, with the reason next to its field."""
    what, _, fix = text.removesuffix(".").partition(". ")
    visit.refusal = UserError(what, where=field, fix=f"{fix}." if fix else None)
    page = show()
    page.status_code = 400
    return page


def find_suspects(visit: Visit) -> Response:
    """Start the search for suspects, which can take long, as a job."""
    adapter = visit.form.get("adapter", "") and visit.chosen("adapter", dict(_judges(visit)))
    chosen = ("--adapter", adapter) if adapter else ()
    said = "When the search is done, this page links to the suspects."
    return visit.start("data", "suspects", *chosen, message=said)


def _suspects_again(visit: Visit) -> Response:
    visit.place = {"queue": "suspects"}
    return review_page(visit)


def _judges(visit: Visit) -> list[tuple[str, str]]:
    """Return what may rank suspects by loss, with the text of its choice; classes need none."""
    if class_like([member.example.output.strip() for member in visit.version.domain]):
        return []
    adapters = [adapter.name for adapter in visit.project.adapters.list()]
    default = "the newest adapter that fits" if adapters else "other rows with the same answer"
    named = [(name, f"adapter {name}: how unlikely it finds the answer") for name in adapters]
    return [("", default), ("base", "the base model: how unlikely it finds the answer"), *named]


def searches(visit: Visit, *, wait: bool = False) -> dict[str, list[Suspect]]:
    """Return the suspects of each search whose result is stored, by judge; an empty name is the default search."""
    judges, deciding = _judges(visit), _stored_searches(visit)
    if not judges or not deciding:
        return computed.stored_searches(visit.project, [""] if deciding else [])
    names = ["", *(name for name, _ in judges if name)]
    found: dict[str, list[Suspect]] = visit.needed(computed.stored_searches, names, deciding=deciding, wait=wait)
    return found


def _stored(visit: Visit, name: str) -> list[Suspect] | None:
    deciding = _stored_searches(visit)
    if not deciding:
        return None
    if not _judges(visit):
        return computed.stored_suspects(visit.project, name)
    # The chat format decides which adapter fits.
    found: list[Suspect] | None = visit.needed(computed.stored_suspects, name, deciding=deciding, wait=bool(visit.form))
    return found


def _stored_searches(visit: Visit) -> list[object]:
    """Return what decides the results of stored searches; nothing if none is stored."""
    folder = visit.project.folder
    files = sorted((folder.work / SUSPECTS).glob("*.json"))
    names = [path.name for path in (*folder.adapters.glob("[!.]*"), *folder.fold_adapters.glob("[!.]*"))]
    return [sorted(names), stamps(files)] if files else []


def agreement_page(visit: Visit) -> Response:
    """Show how far reviewers agree, and the rows on which they do not."""
    report = review_report(visit.project.folder.dataset, visit.version)
    review = review_of(visit, "conflicts")
    assert review is not None
    conflicts = [
        (review.members[key], sorted(review.log.current_verdicts(key).items())) for key in report.conflicts[:_ON_A_PAGE]
    ]
    rows = (
        (each.name, *(f"{count:,}" for count in (each.right, each.wrong, each.edit, each.leave_out, each.skip)))
        for each in report.reviewers
    )
    return visit.page(
        "agreement.html.j2",
        "Review",
        queues=_QUEUES.values(),
        report=report,
        reviewers=table("Reviewers", (*words("Reviewer"), "Right", "Wrong", "Edited", "Left out", "Skipped"), rows),
        conflicts=conflicts,
        mine=review.needed,
        excerpt=excerpt,
        changes=word_changes,
    )


def edits_page(visit: Visit) -> Response:
    """Show the edited answers that are in no version yet, with their differences."""
    edits = pending_edits(read_reviews(visit.project.folder.dataset), visit.version)
    agreed = [edit for edit in edits if not edit.disputed]
    return visit.page(
        "edits.html.j2",
        "Review",
        queues=_QUEUES.values(),
        edits=edits[:_ON_A_PAGE],
        excerpt=excerpt,
        count=len(edits),
        agreed=len(agreed),
        leaving_out=sum(None in edit.outputs.values() for edit in agreed),
        outcome=review_report(visit.project.folder.dataset, visit.version).outcome,
        changes=word_changes,
    )


def apply_edits(visit: Visit) -> Response:
    """Make a new version with the edited answers."""
    made = visit.project.data.apply_reviews(message=visit.form.get("message", ""))
    review = review_report(visit.project.folder.dataset, visit.version)
    return visit.go("/review", f"Made {version_name(made.version)}: {made.version.message}", _looks(review))


def _looks(review: ReviewReport) -> str:
    """Return how many rows of a version that continues a sample need a look; empty for another version."""
    if review.outcome is None or review.drawn is None or review.drawn.continues is None:
        return ""
    if review.outcome.decision != "continue":
        return "No row needs another look: the sample's verdict carries over."
    return f"At least {count_of(review.outcome.needed, 'row')} of the sample need a look, as before the edits."


def _queue(visit: Visit) -> str:
    name = visit.place.get("queue", "sample")
    if name not in _QUEUES:
        raise HTTPException(404)
    return name


def _adapter(visit: Visit, queue: str) -> str:
    """Return the adapter that ranks the suspects; empty: the default."""
    return (visit.form.get("adapter") or visit.query.get("adapter", "")) if queue == "suspects" else ""


def _place(visit: Visit, queue: str) -> str:
    if queue == ONE_ROW:
        return path_of("rows", visit.place["row"])
    adapter = _adapter(visit, queue)
    return _QUEUES[queue].path + (f"?{urlencode({'adapter': adapter})}" if adapter else "")


def _kept_as(visit: Visit, queue: str) -> tuple[str, ...]:
    return (visit.version.digest, visit.session.reviewer, queue, _adapter(visit, queue))


def review_of(visit: Visit, queue: str) -> ReviewSession | None:
    """Return the reviewer's session on a queue of the current version; None if its suspects were not searched yet."""
    version = visit.version
    kept, place = visit.cache.reviews, _kept_as(visit, queue)
    if place in kept:
        kept[place].refresh()
        return kept[place]
    for old in [each for each in kept if each[0] != version.digest]:
        del kept[old]
    adapter = place[-1] or None
    suspects = _stored(visit, place[-1]) if queue == "suspects" else None
    if queue == "suspects" and suspects is None:
        return None
    # On a row's page the verdicts of others are in sight, as in the review of conflicts, and no sample is drawn.
    conflicts = queue in ("conflicts", ONE_ROW)
    options = ReviewOptions(
        adapter=adapter, suspects=queue == "suspects", second=queue == "second", conflicts=conflicts
    )
    kept[place] = visit.project.data.review(
        visit.session.reviewer, options=options, known_suspects=suspects, version=version
    )
    return kept[place]


HANDLERS: Handlers = {
    ("GET", "/review"): review_page,
    ("POST", "/review"): judge_next,
    ("GET", "/review/agreement"): agreement_page,
    ("GET", "/review/edits"): edits_page,
    ("POST", "/review/apply"): in_form("/review/edits", edits_page, apply_edits),
    ("POST", "/review/find-suspects"): in_form("/review/suspects", _suspects_again, find_suspects),
    ("GET", "/review/{queue}"): review_page,
    ("POST", "/review/{queue}"): judge_next,
}
