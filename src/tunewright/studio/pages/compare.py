"""Preferences of people and of a judge: blind comparison, and the judge of an evaluation with its replies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from starlette.responses import Response

from tunewright.annotation import AnnotationSession
from tunewright.core.errors import UserError
from tunewright.data.review.report import review_report
from tunewright.data.versions import current_manifest
from tunewright.evaluation.human_eval.session import BlindPair, BlindReview, ComparisonProgress
from tunewright.evidence.files import DEV_PREFIX, EVIDENCE_FILE
from tunewright.evidence.human_eval import agreement_table, human_eval_section
from tunewright.evidence.judge import judge_section
from tunewright.evidence.schema import Evidence, Item
from tunewright.render.blocks import Cell, Column, Table, table, words
from tunewright.studio.access import RefusedVerdict
from tunewright.studio.pages.evaluate import item_texts
from tunewright.studio.visit import Handlers, Visit, path_of, verdict_of

if TYPE_CHECKING:
    from tunewright.evaluation.judge.questions import ArmPreference, JudgedItem

_NEWEST = 20  # evaluations


def comparisons_page(visit: Visit) -> Response:
    """Show evaluations on the test split, and how far each reviewer has compared their answers."""
    folder = visit.project.folder.evaluations
    files = sorted(folder.glob(f"[!.]*/{EVIDENCE_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    names = [file.parent.name for file in files if not file.parent.name.startswith(DEV_PREFIX)]
    rows: list[tuple[str | Cell, ...]] = []
    for name in names[:_NEWEST]:
        try:
            rows += _progress_rows(visit, name, visit.project.human_eval_progress(folder / name))
        except UserError as error:
            rows.append((visit.evaluation_name(name), str(error), "", "", "", ""))
    head = (Column("Evaluation", words=True), *words("Against", "Reviewer"), "Judged", "Skipped", "Left")
    comparisons = table("Answers of evaluations on the test split", head, rows)
    dataset, older = visit.project.folder.dataset, len(names[_NEWEST:])
    review = review_report(dataset, visit.version) if current_manifest(dataset) else None
    return visit.page("comparisons.html.j2", "Compare", comparisons=comparisons, review=review, left_out=older)


def _progress_rows(
    visit: Visit, name: str, comparisons: Sequence[ComparisonProgress]
) -> Iterator[tuple[str | Cell, ...]]:
    """Yield how far each reviewer has compared an evaluation's answers."""
    title = visit.evaluation_name(name)
    for each in comparisons:
        link = path_of("compare", name, *([each.against] if each.against else []))
        against = each.against or "best prompting arm"
        for reviewer, at in each.reviewers.items():
            judged = f"{at.answered} of {at.asked}"
            yield Cell(title, link=link), against, reviewer, judged, str(at.skipped), str(at.asked - at.answered)
        if not each.reviewers:
            yield Cell(title, link=link), against, "not begun", "", "", ""


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
        shadow="",
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
        text = "That pair was judged meanwhile. Nothing was recorded for it now."
        return visit.go(back, RefusedVerdict(text, "", [note] if note else []))
    if action == "undo":
        return visit.go(back, taken_back(blind))
    assert pair is not None
    if action == "reference":
        blind.show_reference(pair)
    elif action != "note":
        blind.judge(pair, verdict_of(blind, action))
    return visit.go(back)


def taken_back(blind: AnnotationSession[Any, BlindPair, Any]) -> str:
    """Take back the reviewer's latest verdict on a pair, and return a message that names it."""
    last, pair = blind.latest(), blind.undo()
    if last is None or pair is None:
        return "There is nothing to take back."
    return f"Taken back: {last.verdict} on pair {pair.number}."


def _comparison(visit: Visit) -> BlindReview:
    against = visit.place.get("against")
    kept, place = visit.cache.comparisons, (visit.place["evaluation"], visit.session.reviewer, against)
    if place in kept:
        kept[place].refresh()
    else:
        kept[place] = visit.project.human_eval(place[0], reviewer=place[1], against=against)
    return kept[place]


_ON_A_PAGE = 50  # items
_UNSCORED = "no verdict"
_OUTCOMES = {"win": "win", "tie": "tie", "loss": "loss", "changed": "changed with the order", _UNSCORED: _UNSCORED}
"""Choices of the filter, by their value in the address."""


@dataclass(frozen=True)
class _Row:
    """A judged item of the list."""

    number: int
    item: Item
    judged: JudgedItem
    outcome: str


@dataclass(frozen=True)
class _Compared:
    """A comparison of the tuned answer with another arm's."""

    title: str
    found: ArmPreference
    outcome: str
    other: str | None
    """The other answer; None means that it is not stored with the evaluation."""


def judge_page(visit: Visit) -> Response:
    """Show the judge's cost and start, and its findings."""
    name = visit.place["evaluation"]
    evidence, items = visit.project.evidence(name)
    judgement, settings = evidence.judge, visit.project.folder.config.judge
    ready = settings.base_url is not None and settings.model is not None
    estimate, refusal = None, ""
    if ready and (judgement is None or "estimate" in visit.query):
        try:
            estimate = visit.project.estimate_judge(name)
        except UserError as error:
            refusal = str(error)
    agreements = evidence.human_eval.agreements if judgement and evidence.human_eval else ()
    outcome = visit.query.get("outcome", "")
    if outcome and outcome not in _OUTCOMES:
        raise UserError("The page has no such filter", where=name, fix="Choose one of the list.")
    rows = _rows(visit, evidence, items)
    chosen = [row for row in rows if not outcome or row.outcome == _OUTCOMES[outcome]]
    shown, numbers = visit.shown(chosen, _ON_A_PAGE)
    return visit.page(
        "judge.html.j2",
        f"Judge of {visit.evaluation_name(name).lower()}",
        id=name,
        settings=settings,
        ready=ready,
        estimate=estimate,
        refusal=refusal,
        judgement=judgement,
        blocks=judge_section(judgement).blocks if judgement else (),
        agreements=[each for each in agreements if judgement and f"judge {judgement.model}" in each.raters],
        agreement_table=agreement_table,
        people=evidence.human_eval is not None,
        arms=_arms(evidence),
        outcomes=_OUTCOMES,
        outcome=outcome,
        query=urlencode({"outcome": outcome} if outcome else {}),
        rows=_rows_table(name, shown, _arms(evidence), outcome),
        **numbers,
        all_rows=len(rows),
        running=visit.jobs.running(),
    )


def _rows_table(name: str, rows: Sequence[_Row], arms: tuple[str, str], outcome: str) -> Table:
    found: list[tuple[str | Cell, ...]] = []
    for row in rows:
        link = path_of("judge", name, str(row.number)) + (f"?{urlencode({'outcome': outcome})}" if outcome else "")
        found.append((Cell(str(row.number), link=link), row.outcome, *item_texts(row.item, arms)))
    return table("Judged items", words("Item", "Outcome", "Input", "Reference", *arms), found)


def _arms(evidence: Evidence) -> tuple[str, str]:
    """Return the two compared arms."""
    return evidence.contrasts[0].treatment, evidence.contrasts[0].control


def _rows(visit: Visit, evidence: Evidence, items: Sequence[Item]) -> list[_Row]:
    """Return the judged items in the order of the evaluation's items; none for a vetoed judge."""
    if evidence.judge is None or evidence.judge.vetoed:
        return []
    judged = {row.key: row for row in visit.project.judged_items(visit.place["evaluation"])}
    _, control = _arms(evidence)
    return [
        _Row(number, item, judged[item.key], _outcome(judged[item.key].pairs[control].plain))
        for number, item in enumerate(items, start=1)
        if item.key in judged
    ]


def _outcome(found: ArmPreference) -> str:
    if found.outcome is None:
        return _UNSCORED
    return _OUTCOMES["changed"] if found.flipped else found.outcome


def judge_action(visit: Visit) -> Response:
    """Start the judge, compare it with people, or keep its preferences."""
    name, action = visit.place["evaluation"], visit.chosen("action", ("judge", "people", "keep"))
    back = path_of("judge", name)
    if action == "judge":
        _ = visit.project.evaluation(name)
        return visit.start("judge", name)
    if action == "people":
        visit.project.human_eval_results(name)
        return visit.go(back, "People's verdicts are compared with the judge's.")
    kept = visit.project.keep_preferences(name, source="judge")
    return visit.go(back, f"Kept {kept.kept:,} preference pairs ({kept.new:,} new) for preference tuning.")


def judged_item_page(visit: Visit) -> Response:
    """Show one judged item: both answers, the judge's verdicts and its replies."""
    name = visit.place["evaluation"]
    evidence, items = visit.project.evidence(name)
    rows = {str(row.number): row for row in _rows(visit, evidence, items)}
    row = rows.get(visit.place["number"])
    if row is None:
        raise UserError(f"The judge has no item {visit.place['number']!r}", where=name, fix="Choose one of the list.")
    outcome = visit.query.get("outcome", "")
    numbers = [each.number for each in rows.values() if not outcome or each.outcome == _OUTCOMES.get(outcome)]
    treatment, _ = _arms(evidence)
    return visit.page(
        "judged_item.html.j2",
        f"Item {row.number} by the judge",
        id=name,
        row=row,
        model=evidence.judge.model if evidence.judge else "",
        treatment=treatment,
        compared=_compared(row, treatment),
        before=max((each for each in numbers if each < row.number), default=None),
        after=min((each for each in numbers if each > row.number), default=None),
        query=urlencode({"outcome": outcome} if outcome else {}),
    )


def _compared(row: _Row, treatment: str) -> list[_Compared]:
    """Return each comparison of the item, including the form without Markdown if the judge compared it."""
    found = []
    for opponent, pair in row.judged.pairs.items():
        other = row.item.answers.get(opponent)
        title = f"{treatment} against {opponent}"
        found.append(_Compared(title, pair.plain, _outcome(pair.plain), other))
        if pair.stripped is not None:
            found.append(_Compared(f"{title}, without Markdown", pair.stripped, _outcome(pair.stripped), other))
    return found


HANDLERS: Handlers = {
    ("GET", "/compare"): comparisons_page,
    ("GET", "/compare/{evaluation}"): compare_page,
    ("POST", "/compare/{evaluation}"): judge_pair,
    ("GET", "/compare/{evaluation}/{against}"): compare_page,
    ("POST", "/compare/{evaluation}/{against}"): judge_pair,
    ("GET", "/judge/{evaluation}"): judge_page,
    ("POST", "/judge/{evaluation}"): judge_action,
    ("GET", "/judge/{evaluation}/{number}"): judged_item_page,
}
