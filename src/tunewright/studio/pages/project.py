"""The project's page, the page that makes one, and the jobs that are started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import urlencode

from starlette.responses import Response

from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.api import Project
from tunewright.config import PROJECT_NAME
from tunewright.core.errors import UserError
from tunewright.core.text import count_of
from tunewright.data.review.report import review_report
from tunewright.data.splits import too_few
from tunewright.data.versions import DatasetVersion, current_manifest
from tunewright.metrics import score_text
from tunewright.models.sources import BUNDLED, has_packaged
from tunewright.open_project import new_project, project_name
from tunewright.render.blocks import Cell, Table, table, words
from tunewright.report.page import summary
from tunewright.studio.access import keep_reviewer, reviewer_name
from tunewright.studio.jobs import SERVER, Job, refusal, served, trial_of
from tunewright.studio.pages.deploy import follows_releases, made, needs_keys, newest_releases
from tunewright.studio.pages.evaluate import EVALUATE_PAGE, ListedEvaluation, evaluations_of
from tunewright.studio.visit import Handlers, Visit, path_of
from tunewright.studio.words import version_name

_COMMANDS = ("advise", "train", "evaluate", "crossval", "run")
_ON_CLUSTER = (*_COMMANDS, SERVER)
"""Commands whose work the machines of ``compute.cluster`` share."""
_LONG = ("evaluate", "run")
"""Commands whose page first says how long they take."""
_AFTER = {
    "advise": ("/", "the next step of the project"),
    "train": (EVALUATE_PAGE, "evaluate the adapter"),
    "evaluate": ("/", "the result and the next step"),
    "crossval": ("/", "the result and the next step"),
    "run": ("/", "the result and the next step"),
}
"""The page that continues after a command."""
_NEWEST = 10  # evaluations and jobs on the page
_NOT_TO_TRAIN = ("prompt", "retrieve", "no model")
REVIEW = "tunewright data review"


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
    """The same command in a terminal."""
    about: str = ""
    """The purpose of the stage, in a sentence."""
    next_step: str = ""
    """What follows the verdict, in words."""


def project_page(visit: Visit) -> Response:
    """Show the stages of the pipeline, what to do next, the evaluations and the jobs."""
    evaluations = evaluations_of(visit.project)
    newest = next((each for each in evaluations if each.on_test), None)
    versions = {each.digest: version_name(each) for each in visit.project.data.log()}
    evidence = None if newest is None else newest.evidence
    return visit.page(
        "project.html.j2",
        "Project",
        stages=stages(visit.project, evaluations, lambda: visit.version),
        evaluations=evaluations[:_NEWEST],
        newest=newest,
        answer=evidence and summary(evidence, version=versions.get(evidence.lineage.get("dataset", ""), "")),
        jobs=_jobs_table(visit.jobs.all()[:_NEWEST]),
        running=visit.jobs.running(),
        # `run` adds the files that the config lists; a project made in the browser lists no file.
        commands=[
            name
            for name in _COMMANDS
            if name != "crossval" and (name != "run" or visit.project.folder.config.data.sources)
        ],
    )


def _jobs_table(jobs: Sequence[Job]) -> Table:
    rows = ((Cell(job.title, link=path_of("jobs", job.id)), job.minute, job.state) for job in jobs)
    return table("Jobs", words("Command", "Started (UTC)", "State"), rows)


def stages(project: Project, evaluations: list[ListedEvaluation], version: Callable[[], DatasetVersion]) -> list[Stage]:
    """Return the stages that the project has reached, and the next one; ``version`` reads the current version."""
    folder = project.folder
    manifest = current_manifest(folder.dataset)
    if manifest is None:
        command = "tunewright run" if folder.config.data.sources else None
        return [Stage("Data", "next", "No rows yet.", link=("/data", "Upload a file"), command=command)]
    counts = manifest.counts
    split = ", ".join(f"{number:,} {name}" for name, number in counts.domain.items())
    found = [Stage("Data", "done", f"{count_of(counts.rows, 'row')}: {split}", link=("/rows", "Browse the rows"))]
    review = review_report(folder.dataset, version())
    accepted = review.outcome is not None and review.outcome.decision == "accepted"
    state: Literal["done", "open", "next"] = "done" if accepted else "next"
    about = "Judge rows drawn at random, until it is clear whether few enough are wrong."
    link = ("/review", "Review")
    found.append(Stage("Review", state, review.status, link=link, command=REVIEW, about=about))
    adapters = list_adapters(folder.adapters)
    current = [adapter for adapter in adapters if adapter.dataset == manifest.digest]
    found.append(_advise_stage(project, manifest.digest, evaluations))
    few = too_few(counts.domain.get("train", 0))
    against = "" if few else advice_against_training(found)
    state = "done" if current else "next" if accepted and not against else "open"
    text = few or f"{count_of(len(adapters), 'adapter')}, {len(current)} trained on the current version"
    base = folder.config.base_model
    about = (
        f"The base model {base} learns from the train rows. The result is an adapter, a small file next to the base."
    )
    if against and not current:
        about = f"Follow the advice ({against}), or train anyway. {about}"
    link, command = ("/train", "Runs, sweeps and curves"), "tunewright data add FILE" if few else "tunewright train"
    job = None if few else "train"
    found.append(Stage("Train", state, text, job=job, link=link, command=command, about=about))
    measured = [each for each in evaluations if each.on_test]
    state = "done" if measured else "next" if current else "open"
    text = f"{count_of(len(measured), 'evaluation')} on the test split"
    about = (
        "The adapter and the base with prompts answer the test rows. The verdict says whether the adapter is better."
    )
    choices = (EVALUATE_PAGE, "Evaluate: choices and times") if current else None
    found.append(Stage("Evaluate", state, text, link=choices, command="tunewright evaluate", about=about))
    if measured:
        newest = measured[0]
        link, after = (path_of("report", newest.id), "Read the report"), _after_verdict(evaluations[0], adapters)
        found.append(Stage("Verdict", "done", newest.verdict, link=link, next_step=after))
        if any(each.verdict == "ship" for each in measured):
            found.append(_deploy_stage(project))
    return _with_one_next(found)


def _with_one_next(found: Sequence[Stage]) -> list[Stage]:
    """Return the stages with one *next*: after the last one done; then the verdict's own step; then what was passed."""
    done = max((place for place, stage in enumerate(found) if stage.state == "done"), default=-1)
    marked = [place for place, stage in enumerate(found) if stage.state == "next"]
    own = [place for place, stage in enumerate(found) if stage.next_step]
    chosen = next(iter([*(place for place in marked if place > done), *own, *marked]), None)
    return [
        replace(stage, state="next" if place == chosen else "open" if stage.state == "next" else stage.state)
        for place, stage in enumerate(found)
    ]


def advice_against_training(found: Sequence[Stage]) -> str:
    """Return the answer of advice not to train (prompt, retrieve or no model); empty without such advice."""
    answer = next((each.text.partition(": ")[0] for each in found if each.name == "Advise"), "")
    return answer if answer in _NOT_TO_TRAIN else ""


def _after_verdict(newest: ListedEvaluation, adapters: Sequence[Adapter]) -> str:
    """Return the step after the newest evaluation, which may be of an earlier adapter; empty to deploy it."""
    if newest.evidence is None or (newest.on_test and newest.verdict == "ship"):
        return ""
    measured = newest.evidence.lineage.get("adapter", {}).get("digest")
    trained = [adapter.digest for adapter in adapters if adapter.imported is None]
    if measured is not None and trained and trained[-1] != measured:
        return "tunewright evaluate"
    return newest.next_step or "tunewright report"


def _advise_stage(project: Project, dataset: str, evaluations: Sequence[ListedEvaluation]) -> Stage:
    state: Literal["done", "open"] = "open"
    text, files = "no advice on the current version", project.folder.advice.glob("[!.]*.json")
    # `run` and `evaluate` measure the prompting arms of the advice, without its pilot.
    for evidence in (each.evidence for each in reversed(evaluations) if each.evidence is not None):
        best = next((arm for arm in evidence.dev_arms if arm.name == evidence.best_prompting), None)
        if best is not None and evidence.lineage["dataset"] == dataset:
            score = score_text(evidence.metric, best.score(evidence.metric).value)
            state, text = "done", f"prompting measured on dev: best arm {best.name}, {score}"
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        try:
            advice = project.advise(file)
        except UserError as error:
            text = str(error)
            continue
        if advice.signals.lineage.get("dataset") == dataset:
            state, text = "done", f"{advice.decision.answer}: {advice.decision.why}"
    about = "Prompts and a pilot adapter answer the dev rows, which shows whether training is worth it."
    return Stage("Advise", state, text, job="advise", command="tunewright advise", about=about)


def _deploy_stage(project: Project) -> Stage:
    live = [release for release in newest_releases(project) if not release.undeployed]
    text = f"Live: {'; '.join(f'{each.alias} ({made(each)})' for each in live)}" if live else "No alias is live yet."
    link = ("/deploy", "Aliases and releases" if live else "Release the adapter")
    return Stage("Deploy", "done" if live else "next", text, link=link, command="tunewright deploy ALIAS ADAPTER")


def choose_reviewer(visit: Visit) -> Response:
    """Record reviews under another name from now on."""
    typed, back = visit.form.get("reviewer", ""), visit.form.get("back", "/")
    back = back if back.startswith("/") and not back.startswith("//") else "/"
    try:
        visit.session.reviewer = name = reviewer_name(typed)
    except UserError as refusal:
        visit.session.refused_name = typed, f"{refusal.what}. {refusal.fix}"
        return visit.go(back)
    return keep_reviewer(visit.go(back, f"You review as {name} now."), name)


def start_job(visit: Visit) -> Response:
    """Start one of the commands of the pipeline."""
    name = visit.chosen("command", _COMMANDS)
    return visit.go(EVALUATE_PAGE) if name in _LONG else visit.start(name)


def job_page(visit: Visit) -> Response:
    """Show a job's log, which grows while it runs."""
    job = visit.jobs.find(visit.place["job"])
    server, state = served(job), job.state
    progress, message = job.newest if state == "running" and job.command[0] != SERVER else (None, "")
    shared = state == "running" and job.title in _ON_CLUSTER
    return visit.page(
        "job.html.j2",
        f"Job: {job.title}",
        job=job,
        state=state,
        progress=progress,
        message=message,
        cluster=visit.project.folder.config.compute.cluster if shared else None,
        refusal=refusal(job),
        trial=trial_of(job),
        serving=(newest := visit.jobs.server()) is not None and newest.state == "running",
        served=server,
        keys=needs_keys(visit),
        follows=follows_releases(visit, None if newest is None else served(newest)),
        next_page=_next_page(job),
        run=_run_of(visit, job),
    )


def _run_of(visit: Visit, job: Job) -> str | None:
    """Return the page with the curves of the job's training, in progress or finished; None without one."""
    if job.command[0] not in ("train", "run") or {"--sweep", "--curve"} & set(job.command):
        return None
    runs = visit.project.runs
    if job.state == "running":
        name = run.name if (run := runs.unfinished) is not None and run.state == "running" else None
    else:
        log = job.log.read_text(encoding="utf-8", errors="replace")
        name = next((run.name for run in runs.list() if run.adapter is not None and run.name in log), None)
    return name and path_of("train", "runs", name)


def _next_page(job: Job) -> tuple[str, str] | None:
    """Return the page that continues after a job that has ended well, or starts a stopped one again; and its text."""
    if job.title == "judge" and job.state != "running":
        text = "the judge's findings" if job.state == "done" else "the judge, which resumes from the replies it has"
        return path_of("judge", job.command[1]), text
    if job.state == "stopped" and job.title in _COMMANDS:
        page = EVALUATE_PAGE if job.title in _LONG else "/"
        return page, "start it again, which resumes from what was finished"
    if job.state != "done":
        return None
    if job.title == "data suspects":
        options = dict(zip(job.command, job.command[1:], strict=False))
        adapter = options.get("--adapter", "")
        return "/review/suspects" + (f"?{urlencode({'adapter': adapter})}" if adapter else ""), "review the suspects"
    return _AFTER.get(job.title)


def stop_job(visit: Visit) -> Response:
    """Stop a job as Ctrl-C does."""
    job = visit.jobs.find(visit.place["job"])
    job.stop()
    kept = "Running answers are finished first." if job.command[0] == SERVER else "What was finished is kept."
    return visit.go(path_of("jobs", job.id), f"Stopping. {kept}")


NEW_PROJECT = "/new"


def new_page(visit: Visit) -> Response:
    """Ask for the name and the base of a new project."""
    if visit.project.folder.has_config:
        return visit.go("/", "The folder has a project already.")
    return _form(visit, project_name(visit.project.folder.root), "bundled", "")


def create(visit: Visit) -> Response:
    """Write the project's config, as ``tunewright init`` does."""
    name, choice = visit.form.get("name", "").strip(), visit.form.get("choice", "")
    other = visit.form.get("base_model", "").strip()
    try:
        if choice != "bundled" and not other:
            raise UserError("No base model was named", fix="Type its folder or hub id.")
        if choice == "bundled" and other:
            fix = "Choose the other model, or empty its field."
            raise UserError(f"SmolLM2 135M is chosen, and another base model is named: {other}", fix=fix)
        new_project(visit.project.folder.root, name=name, base_model=BUNDLED if choice == "bundled" else other)
    except UserError as refusal:
        if visit.project.folder.has_config:  # the project was made in another tab or a terminal meanwhile
            return visit.go("/", "The folder has a project already. Nothing was changed.")
        return _form(visit, name, choice, other, refusal)
    return visit.go("/data", f"Made the project {name}. Upload your examples next.")


def _form(visit: Visit, name: str, choice: str, base_model: str, refusal: UserError | None = None) -> Response:
    page = visit.page(
        "new_project.html.j2",
        "New project",
        folder=str(visit.project.folder.root),
        name=name,
        pattern=PROJECT_NAME,
        choice=choice,
        base_model=base_model,
        has_bundled=has_packaged(BUNDLED),
        refusal=refusal,
    )
    page.status_code = 200 if refusal is None else 400
    return page


HANDLERS: Handlers = {
    ("GET", "/"): project_page,
    ("POST", "/reviewer"): choose_reviewer,
    ("POST", "/jobs"): start_job,
    ("GET", "/jobs/{job}"): job_page,
    ("POST", "/jobs/{job}/stop"): stop_job,
    ("GET", NEW_PROJECT): new_page,
    ("POST", NEW_PROJECT): create,
}
