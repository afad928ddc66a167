"""The studio's pages. Each calls what the command line calls, and writes the same files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from starlette.responses import HTMLResponse, Response

from tunewright.adapters.registry import list_adapters
from tunewright.api.data import AddOptions
from tunewright.core.errors import UserError
from tunewright.core.text import count_of
from tunewright.data.dedup import cluster_counts
from tunewright.data.review.label_models import excerpt
from tunewright.data.review.report import review_report
from tunewright.data.review.reviews import Verdict
from tunewright.data.review.session import ReviewSession
from tunewright.data.trace import find_row, metadata_by_key
from tunewright.data.versions import current_manifest
from tunewright.evaluation.human_eval.journal import Side
from tunewright.evaluation.human_eval.session import BlindReview
from tunewright.evidence.schema import DEV_PREFIX, EVIDENCE_FILE
from tunewright.studio.jobs import COMMANDS
from tunewright.studio.visit import Handler, Visit, path_of

UPLOADS = "uploads"
"""The folder of uploaded files, in the project's."""

_ON_A_PAGE = 50  # rows
_FAULTS = 100  # of a file on its page
_NEWEST = 10  # evaluations on the project's page
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline on the project's page."""

    name: str
    state: Literal["done", "open", "next"]
    text: str
    job: str | None = None
    """The command that a button starts."""
    link: tuple[str, str] | None = None
    """A page: its path, and the text of the link."""
    command: str | None = None
    """The same in a terminal."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on the project's page; ``unreadable`` stands for the verdict of damaged evidence."""

    id: str
    verdict: str
    reason: str
    on_test: bool


# The project


def project_page(visit: Visit) -> Response:
    """Show the stages of the pipeline, what to do next, the evaluations and the jobs."""
    evaluations = _evaluations(visit)
    return visit.page(
        "project.html.j2",
        "Project",
        stages=_stages(visit, evaluations),
        evaluations=evaluations[:_NEWEST],
        jobs=visit.jobs.all()[:_NEWEST],
        running=visit.jobs.running(),
        commands=COMMANDS,
    )


def _stages(visit: Visit, evaluations: list[Evaluation]) -> list[Stage]:
    folder = visit.project.folder
    manifest = current_manifest(folder.dataset)
    if manifest is None:
        return [
            Stage("Data", "next", "No rows yet.", link=("/data", "Upload a file"), command="tunewright data add FILE")
        ]
    counts = manifest.counts
    split = ", ".join(f"{number:,} {name}" for name, number in counts.domain.items())
    stages = [Stage("Data", "done", f"{count_of(counts.rows, 'row')}: {split}", link=("/rows", "Browse the rows"))]
    review = review_report(folder.dataset, visit.version)
    accepted = review.outcome is not None and review.outcome.decision == "accepted"
    stages.append(
        Stage(
            "Review",
            "done" if accepted else "next",
            review.status,
            link=("/review", "Review"),
            command="tunewright data review",
        )
    )
    adapters = list_adapters(folder.adapters)
    current = [adapter for adapter in adapters if adapter.dataset == manifest.digest]
    text = f"{count_of(len(adapters), 'adapter')}, {len(current)} of them on the current version"
    stages.append(Stage("Train", "done" if current else "next", text, job="train", command="tunewright train"))
    measured = [each for each in evaluations if each.on_test]
    state: Literal["done", "open", "next"] = "done" if measured else "next" if current else "open"
    text = f"{count_of(len(measured), 'evaluation')} on the test split"
    stages.append(Stage("Evaluate", state, text, job="evaluate" if current else None, command="tunewright evaluate"))
    if measured:
        newest = measured[0]
        stages.append(Stage("Verdict", "done", newest.verdict, link=(path_of("report", newest.id), "Read the report")))
    return stages


def _evaluations(visit: Visit) -> list[Evaluation]:
    folder = visit.project.folder.evaluations
    files = sorted(folder.glob(f"[!.]*/{EVIDENCE_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    found = []
    for file in files[:_NEWEST]:
        name = file.parent.name
        try:
            verdict = visit.project.verdict(file.parent)
        except UserError as error:
            found.append(Evaluation(name, "unreadable", str(error), on_test=False))
        else:
            on_test = not name.startswith(DEV_PREFIX)
            against = [f"Incumbent {each.incumbent.name}: {each.outcome}." for each in verdict.replacements]
            found.append(Evaluation(name, verdict.decision, " ".join([verdict.reasons[0], *against]), on_test))
    return found


def choose_reviewer(visit: Visit) -> Response:
    """Record reviews under another name from now on."""
    name = visit.form.get("reviewer", "").strip()
    if not name:
        raise UserError("The reviewer's name is empty", fix="Go back and type a name.")
    visit.session.reviewer = name
    back = visit.form.get("back", "/")
    return visit.go(back if back.startswith("/") and not back.startswith("//") else "/", f"You review as {name} now.")


# Jobs


def start_job(visit: Visit) -> Response:
    """Start a command."""
    job = visit.jobs.start(visit.form.get("command", ""))
    return visit.go(path_of("jobs", job.id))


def job_page(visit: Visit) -> Response:
    """Show a job's log, which grows while it runs."""
    job = visit.jobs.find(visit.place["job"])
    return visit.page("job.html.j2", f"Job: {job.command[0]}", job=job, state=job.state)


def stop_job(visit: Visit) -> Response:
    """Stop a job as Ctrl-C does."""
    job = visit.jobs.find(visit.place["job"])
    job.stop()
    return visit.go(path_of("jobs", job.id), "Stopping. What was finished is kept, and the same command resumes.")


# Data


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


# Rows


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


# Review


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


# Blind comparison


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


# Reports


def report_page(visit: Visit) -> Response:
    """Show an evaluation's report, which is a page of its own with its styles inside."""
    text = visit.project.report(visit.place["evaluation"]).read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": _REPORT_POLICY})


HANDLERS = cast(
    "dict[tuple[str, str], Handler]",
    {
        ("GET", "/"): project_page,
        ("POST", "/reviewer"): choose_reviewer,
        ("POST", "/jobs"): start_job,
        ("GET", "/jobs/{job}"): job_page,
        ("POST", "/jobs/{job}/stop"): stop_job,
        ("GET", "/data"): data_page,
        ("GET", "/data/check"): check_page,
        ("POST", "/data/add"): add_file,
        ("GET", "/rows"): rows_page,
        ("GET", "/rows/{row}"): row_page,
        ("GET", "/review"): review_page,
        ("POST", "/review"): judge_row,
        ("POST", "/review/apply"): apply_edits,
        ("GET", "/compare/{evaluation}"): compare_page,
        ("POST", "/compare/{evaluation}"): judge_pair,
        ("GET", "/report/{evaluation}"): report_page,
    },
)
