"""Blind comparison."""

from __future__ import annotations

from starlette.responses import Response

from tunewright.core.errors import UserError
from tunewright.data.review.report import ReviewReport, review_report
from tunewright.data.versions import current_manifest
from tunewright.evaluation.human_eval.session import BlindReview, ComparisonProgress
from tunewright.evidence.files import DEV_PREFIX, EVIDENCE_FILE
from tunewright.evidence.human_eval import human_eval_section
from tunewright.studio.visit import Handlers, Visit, path_of, verdict_of

_NEWEST = 20  # evaluations


def comparisons_page(visit: Visit) -> Response:
    """Show the evaluations on the test split, and how far each reviewer has compared their answers."""
    folder = visit.project.folder.evaluations
    files = sorted(folder.glob(f"[!.]*/{EVIDENCE_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    names = [file.parent.name for file in files if not file.parent.name.startswith(DEV_PREFIX)]
    found: list[tuple[str, list[ComparisonProgress], str | None]] = []
    for name in names[:_NEWEST]:
        try:
            found.append((name, visit.project.human_eval_progress(folder / name), None))
        except UserError as error:
            found.append((name, [], str(error)))
    return visit.page(
        "comparisons.html.j2", "Compare", evaluations=found, review=_row_review(visit), left_out=len(names) - len(found)
    )


def _row_review(visit: Visit) -> ReviewReport | None:
    """Return the state of the rows' review; None without rows."""
    dataset = visit.project.folder.dataset
    return None if current_manifest(dataset) is None else review_report(dataset, visit.version)


def compare_page(visit: Visit) -> Response:
    """Show the next pair of answers, or the result once the sample is complete."""
    blind, evaluation, against = _comparison(visit), visit.place["evaluation"], visit.place.get("against")
    pair = blind.next()
    # Seen earlier, an estimate would tempt to stop where it pleases.
    complete = pair is None and blind.progress.skipped == 0
    return visit.page(
        "compare.html.j2",
        "Compare",
        evaluation=evaluation,
        path=_path(visit),
        against=against,
        progress=blind.progress,
        keys=blind.verdict_keys,
        pair=pair,
        result=human_eval_section(visit.project.human_eval_results(evaluation, against=against)) if complete else None,
    )


def _path(visit: Visit) -> str:
    return path_of("compare", *(visit.place[name] for name in ("evaluation", "against") if name in visit.place))


def judge_pair(visit: Visit) -> Response:
    """Record a verdict, a note or a look at the reference."""
    blind, action = _comparison(visit), visit.form.get("action", "")
    back = _path(visit)
    pair, note = blind.next(), visit.form.get("note", "").strip()
    if pair is not None and pair.key == visit.form.get("key"):
        if "note" in visit.form:
            blind.note(pair, note)
    elif action != "undo" or note:
        text = f" Your note was: {note}" if note else ""
        return visit.go(back, f"That pair was judged meanwhile. Nothing was recorded for it now.{text}")
    if action == "undo":
        return visit.go(back, "Taken back." if blind.undo() is not None else "There is nothing to take back.")
    assert pair is not None
    if action == "reference":
        blind.show_reference(pair)
    elif action != "note":
        blind.judge(pair, verdict_of(blind, action))
    return visit.go(back)


def _comparison(visit: Visit) -> BlindReview:
    against = visit.place.get("against")
    kept, place = visit.cache.comparisons, (visit.place["evaluation"], visit.session.reviewer, against)
    if place in kept:
        kept[place].refresh()
    else:
        kept[place] = visit.project.human_eval(place[0], reviewer=place[1], against=against)
    return kept[place]


HANDLERS: Handlers = {
    ("GET", "/compare"): comparisons_page,
    ("GET", "/compare/{evaluation}"): compare_page,
    ("POST", "/compare/{evaluation}"): judge_pair,
    ("GET", "/compare/{evaluation}/{against}"): compare_page,
    ("POST", "/compare/{evaluation}/{against}"): judge_pair,
}
