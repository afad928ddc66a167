"""Blind comparison."""

from __future__ import annotations

from starlette.responses import Response

from tunewright.core.errors import UserError
from tunewright.evaluation.human_eval.journal import Side
from tunewright.evaluation.human_eval.session import BlindReview
from tunewright.studio.visit import Handlers, Visit, path_of

_SIDES: dict[str, Side] = {"A": "A", "B": "B", "both": "both", "neither": "neither", "skip": "skip"}


def compare_page(visit: Visit) -> Response:
    """Show the next pair of answers, or the result once the sample is complete."""
    blind = _comparison(visit)
    pair = blind.next()
    complete = pair is None and blind.progress.skipped == 0
    return visit.page(
        "compare.html.j2",
        "Compare",
        evaluation=visit.place["evaluation"],
        progress=blind.progress,
        pair=pair,
        # Seen earlier, an estimate would tempt to stop where it pleases.
        result=visit.project.human_eval_results(visit.place["evaluation"]) if complete else None,
    )


def judge_pair(visit: Visit) -> Response:
    """Record a verdict, a note or a look at the reference."""
    blind, action = _comparison(visit), visit.form.get("action", "")
    back = path_of("compare", visit.place["evaluation"])
    if action == "undo":
        return visit.go(back, "Taken back." if blind.undo() is not None else "There is nothing to take back.")
    pair = blind.next()
    if pair is None or pair.key != visit.form.get("key"):
        return visit.go(back, "That pair was judged meanwhile. Nothing was recorded for it now.")
    if "note" in visit.form:
        blind.note(pair, visit.form["note"])
    if action == "reference":
        blind.show_reference(pair)
    elif action in _SIDES:
        blind.answer(pair, _SIDES[action])
    elif action != "note":
        raise UserError(f"Unknown verdict {action!r}", fix="Use the buttons of the page.")
    return visit.go(back)


def _comparison(visit: Visit) -> BlindReview:
    kept, place = visit.cache.comparisons, (visit.place["evaluation"], visit.session.reviewer)
    if place in kept:
        kept[place].refresh()
    else:
        kept[place] = visit.project.human_eval(place[0], reviewer=place[1])
    return kept[place]


HANDLERS: Handlers = {
    ("GET", "/compare/{evaluation}"): compare_page,
    ("POST", "/compare/{evaluation}"): judge_pair,
}
