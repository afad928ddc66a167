"""``init``, ``migrate``, ``config``, ``run``, ``demo`` and ``studio``: the project as a whole."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunewright.cli.app import PROJECT, Minutes, app, command, given_options, group
from tunewright.cli.console import RESUMES, Session
from tunewright.cli.data_review import interactive
from tunewright.cli.evaluate import verdict_text
from tunewright.cli.start import ADD_FILES, ask, look_at
from tunewright.core.errors import UserError
from tunewright.core.options import TaskName
from tunewright.core.text import count_of
from tunewright.data.options import ColumnMapping
from tunewright.render.blocks import Block, Lead, table, words

if TYPE_CHECKING:
    from tunewright.data.migrate import Service
    from tunewright.data.task import Proposal
    from tunewright.demo import DemoAnswers, TwoTenants
    from tunewright.evidence.schema import Advice
    from tunewright.pipeline import RunResult
    from tunewright.render.terminal import Part

_SHORT = 12
_STAGES = {"data": 0.1, "advise": 6.0, "train": 6.0, "evaluate": 6.0, "report": 0.1}
"""Stages of `run`, with their usual shares of the time."""
_DEMO_STAGES = _STAGES | {"advise": 2.8, "train": 3.5, "evaluate": 3.5, "answers": 0.3, "tenants": 2.5}
"""Stages of `demo` with its quick settings, in minutes of processor time on one thread."""


@command(
    app,
    "init",
    panel=PROJECT,
    options=ColumnMapping,
    example="tunewright init my-model --data tickets.csv",
    status=False,
    project=False,
)
def init(
    run: Session,
    directory: Annotated[Path, typer.Argument(help="Folder of the new project.")] = Path(),
    example: Annotated[
        str | None, typer.Option(help="Write this complete example project: legal-citations, bfcl or orders.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Your examples: a file, a folder or hf://datasets/NAME (repeatable). With --example bfcl: the folder "
            "of its data.",
            metavar="FILE",
        ),
    ] = None,
    task: Annotated[
        TaskName | None, typer.Option(help="Task, which decides the metric.", show_default="from the answers' shape")
    ] = None,
    options: ColumnMapping = ColumnMapping(),
    name: Annotated[str | None, typer.Option(help="The project's name.", show_default="from the folder's name")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model: a folder (relative to the project) or a hub id.", show_default="the bundled base"
        ),
    ] = None,
) -> None:
    """Write a commented tunewright.yaml that fits your examples, or a whole example project.

    On a terminal and without options it asks for the file and the task.
    """
    from tunewright.config.project import CONFIG_FILE, create_project
    from tunewright.open_project import check_new_project, new_project

    there = "" if directory.resolve() == Path().resolve() else f"cd {shlex.quote(str(directory))} && "
    given = given_options(options) + ["--task"] * (task is not None)
    if given and not data:
        raise UserError(f"{given[0]} requires --data")
    given += [f"--{key}" for key, value in {"name": name, "base": base}.items() if value is not None]
    if example is not None:
        files = _example_files(run, example, data or [], given)
        project, lines, next_command = create_project(directory, files), list[str](), "tunewright run"
        document: dict[str, Any] = {"project": str(directory), "files": sorted(files)}
    else:
        check_new_project(directory, name, base)
        found = look_at(run, data, options) if data else None
        if found and task:
            found = replace(found, name=task, because="--task")
        if not data and not given and not run.as_json and interactive():
            found = ask(run)
        project = new_project(
            directory, name=name, base_model=base, sections=found.sections(directory) if found else {}
        )
        document, lines, next_command = {"project": str(directory), "files": [CONFIG_FILE]}, [], ADD_FILES
        if found:
            document |= {"task": found.name, **found.columns, "metric": found.task.metric}
            lines, next_command = _proposal(found, directory)
    config = project.config
    document |= {"name": config.name, "base_model": config.base_model}
    written = [
        f"Wrote {', '.join(document['files'])} in {directory.resolve()}",
        f"Name: {config.name}{'' if name or example else ', from the folder (--name chooses another)'}",
        f"Base model: {config.base_model} (base_model in tunewright.yaml names another: a folder or a hub id)",
    ]
    run.show(document, "\n".join([*written, *lines, f"Next: {there}{next_command}"]))


def _example_files(run: Session, example: str, data: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """Return the files of an example project; options of other projects are refused."""
    from tunewright.examples import example_files

    if given:
        raise UserError(f"{given[0]} and --example are mutually exclusive")
    if len(data) > 1:
        raise UserError(f"--example takes one --data (got {len(data)})")
    return example_files(example, Path(data[0]) if data else None, run.reporter)


def _proposal(found: Proposal, directory: Path) -> tuple[list[str], str]:
    """Return lines on the proposed task, metric, instruction and split, and the next command."""
    from tunewright.data.splits import too_few

    lines = [
        f"Task: {found.name} ({found.because})",
        f"Metric: {json.dumps(found.task.metric)} ({found.task.why})",
    ]
    if found.instruction:
        lines.append(found.instruction)
    if found.splits:
        named = ", ".join(f"{Path(name).name} is {found.splits[name]}" for name in found.sources)
        dev = "" if "dev" in found.splits.values() else "; dev is drawn from train"
        lines.append(f"Split: {named}, by their names{dev} (data.sources in tunewright.yaml changes it)")
    if few := too_few(found.training_rows):
        add = shlex.join(found.paths(directory))
        return [*lines, f"About {few}"], f"tunewright data add {add} && tunewright advise"
    return lines, "tunewright run"


config_app = group("config", PROJECT, "Show the config's resolved values and its JSON Schema.")


@command(config_app, "schema", example="tunewright config schema", status=False, project=False, json=False)
def config_schema(run: Session) -> None:
    """Print the JSON Schema of tunewright.yaml, for editors."""
    from tunewright.config import Config

    run.print_out(json.dumps(Config.model_json_schema(), indent=2) + "\n")


@command(config_app, "show", example="tunewright config show", status=False)
def config_show(run: Session) -> None:
    """Print every value of the config, with presets and defaults filled in."""
    import yaml

    values = run.project.folder.config.model_dump(mode="json")
    run.show(values, yaml.safe_dump(values, sort_keys=False).rstrip())


@command(app, "run", panel=PROJECT, cluster=True, loads=True, example="tunewright run", kept=RESUMES)
def run(
    run: Session,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Continue with fewer than 50 training pairs, or with a test split too small for any verdict.",
        ),
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave faulty rows out and list them by cause, as `data add` does.")
    ] = False,
    minutes: Minutes = None,
) -> int:
    """Run the whole pipeline: data, advise, train, evaluate, verdict, report. Resumes where it stopped.

    --minutes does not limit the training. To keep the test split closed, use `advise`, `train` and `evaluate --dev`.
    """
    with run.reporter.pipeline(_STAGES) as stage_done:
        result = run.project.run(
            force=force,
            skip_bad=skip_bad,
            minutes=minutes,
            stage_done=stage_done,
            prompting_done=partial(show_prompting, run),
        )
        if stage_done:
            stage_done("report", True, result.report.name)
    run.show(run_document(result), *run_tables(result))
    return result.verdict.exit_code


@command(
    app,
    "demo",
    panel=PROJECT,
    cluster=True,
    loads=True,
    example="tunewright demo tunewright-demo",
    kept=RESUMES,
    status=False,
    project=False,
)
def demo(
    run: Session,
    directory: Annotated[Path, typer.Argument(help="Folder of the demo project.")] = Path("tunewright-demo"),
    whole: Annotated[
        bool,
        typer.Option(
            "--whole",
            help="Try more prompting arms, train two epochs, and also run a pilot, a learning curve and a judge, which "
            "takes an hour more.",
        ),
    ] = False,
) -> int:
    """Run the pipeline on an example project, then serve its result to two tenants and ask it a held-out question."""
    from tunewright.cli.advise import advice_tables
    from tunewright.demo import ask_three_ways, choose_item, measure_slow_parts, member_of, open_demo, show_two_tenants
    from tunewright.evidence.files import load_items
    from tunewright.evidence.judge import judge_section
    from tunewright.evidence.learning_curve import curve_section

    project = open_demo(directory, run.reporter, whole=whole, cluster=run.cluster)
    with run.reporter.pipeline(_DEMO_STAGES) as stage_done:
        result = project.run(stage_done=stage_done, prompting_done=partial(show_prompting, run))
        if stage_done:
            stage_done("report", True, result.report.name)
        run.reporter.say(f"Verdict: {result.verdict.decision}. The demo now serves the adapter to two tenants.")
        item = choose_item(load_items(result.evaluated.folder), result.evaluated.evidence.metric)
        answered = ask_three_ways(project, result, item)
        if stage_done:
            stage_done("answers", True, "base, an earlier checkpoint and the adapter on one server")
        tenants = show_two_tenants(project, result, member_of(project, item))
        if stage_done:
            stage_done("tenants", True, "isolation test, two tenants on one server")
    document = {**run_document(result), "served": answered, "tenants": tenants.as_dict() if tenants else None}
    shown = [*run_tables(result), *answers_blocks(answered), *(two_tenants_blocks(tenants) if tenants else ())]
    if whole:
        rest = measure_slow_parts(project, result.evaluated.folder)
        document |= rest.as_dict()
        shown += [*advice_tables(rest.advice), curve_section(rest.curve.curve)]
        shown += [judge_section(rest.judged.judgement), f"Report: {rest.report}"]
    run.show(document, *shown)
    run.report_review_status(directory)
    return result.verdict.exit_code


def show_prompting(run: Session, advice: Advice) -> None:
    """Print the prompting arms' scores as progress, on stderr."""
    from tunewright.evidence.blocks import advice_section

    run.note(advice_section(advice))


def run_tables(result: RunResult) -> list[Part]:
    """Return the pipeline's result as tables."""
    from tunewright.evidence.blocks import evaluation_sections

    return [*evaluation_sections(result.evaluated.evidence), verdict_text(result.verdict), f"Report: {result.report}"]


def run_document(result: RunResult) -> dict[str, Any]:
    """Return the pipeline's result as JSON."""
    return {
        "data": result.added.as_dict(),
        "advice": result.advised.advice.model_dump(mode="json"),
        "adapter": result.trained.adapter.name,
        "evidence": result.evaluated.evidence.model_dump(mode="json"),
        "verdict": result.verdict.as_dict(),
        "report": str(result.report),
    }


def answers_blocks(answered: DemoAnswers) -> tuple[Block, ...]:
    """Return one question and each model's answer."""
    rows = [*answered.answers.items(), (f"base, {answered.best_prompting} (in the evaluation)", answered.prompted)]
    title = f"Served: {answered.question}\nReference: {answered.reference}"
    return (Lead(title), table("Answers", words("Model", "Answer"), rows))


def two_tenants_blocks(shown: TwoTenants) -> tuple[Block, ...]:
    """Return the models, answers and usage of each of two tenants on one server."""
    from tunewright.serving.tenants.blocks import releases_blocks

    rows = []
    for visit in shown.visits:
        refused = f"{visit.others_alias}, as if it did not exist" if visit.same_refusal else str(visit.others_alias)
        used = f"{count_of(visit.requests, 'request')}, {visit.tokens} tokens"
        seen = (visit.tenant, ", ".join(visit.sees), visit.answered_by[:_SHORT])
        rows.append((*seen, visit.answer, refused, used))
    head = words("Tenant", "Sees", "Answered by", "Answer", "The other's alias", "Used")
    return (
        *releases_blocks(shown.releases),
        Lead(f"Two tenants on one base, asked: {shown.question}\nReference: {shown.reference}"),
        table("Tenants", head, rows),
        Lead(f"To look at it later: tunewright releases --database-url {shown.state}"),
    )


migrate_app = group("migrate", PROJECT, "Make a project from a hosted fine-tuning job's files.")

Job = Annotated[Path, typer.Argument(help="The job's object, as the service's API returns it (JSON).")]
Train = Annotated[Path, typer.Option("--train", help="The job's training file (JSON Lines).")]
Validation = Annotated[Path | None, typer.Option("--validation", help="The job's validation file.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the new project.")]
Base = Annotated[
    str | None, typer.Option("--base", help="Open-weight base to tune.", show_default="the job's, if it is on the hub")
]
_EXAMPLE = "tunewright migrate {} job.json --train train.jsonl --out courts"


def _add_service(service: Service, name: str) -> None:
    def from_job(
        run: Session, job: Job, train: Train, out: Out, validation: Validation = None, base: Base = None
    ) -> None:
        from tunewright.config.project import create_project
        from tunewright.data.migrate import described, migrate

        migration = migrate(service, job, train, validation, base)
        create_project(out, migration.files)
        for difference in migration.differences:
            run.reporter.warn(difference)
        run.show(
            {
                "project": str(out),
                "files": sorted(migration.files),
                "rows": migration.rows,
                "differences": migration.differences,
                "incumbent": migration.incumbent,
            },
            f"Wrote {', '.join(sorted(migration.files))} in {out.resolve()}",
            *described(migration),
            "Next: choose base_model in tunewright.yaml, then run there: tunewright data add "
            + " ".join(sorted(migration.rows)),
        )

    from_job.__doc__ = f"Make a project from {name} job: its rows, the nearest settings, its model as incumbent."
    command(migrate_app, service, example=_EXAMPLE.format(service), status=False, project=False)(from_job)


_add_service("openai", "an OpenAI")
_add_service("together", "a Together")
_add_service("fireworks", "a Fireworks")


@command(app, "studio", panel=PROJECT, example="tunewright studio", kept=RESUMES, status=False, traced=False)
def studio(
    run: Session,
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback requires a password.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any.")] = 8765,
    password_file: Annotated[
        Path | None,
        typer.Option(help="File with the password that signs browsers in.", show_default="a token in the address"),
    ] = None,
    reviewer: Annotated[
        str | None,
        typer.Option(
            help="Name that reviews are recorded under.", show_default="git's user.name, else your login name"
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Show the finished demo project, read-only and without sign-in.")
    ] = False,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the address in your browser.")] = True,
) -> None:
    """Open the project in a browser: rows, review, blind comparison, reports and jobs, until Ctrl-C.

    Jobs that were started on a page continue when the studio ends. In a folder without a project, the first page makes
    one.
    """
    import webbrowser

    from tunewright.data.review.session import reviewer_name
    from tunewright.studio import Studio

    def started(url: str) -> None:
        run.show({"url": url}, f"The studio is at {url}\nCtrl-C ends it.")
        if browser:
            webbrowser.open(url)

    if not demo:
        password = None if password_file is None else _password(password_file)
        Studio(run.folder, reviewer_name(reviewer, run.folder), password=password).run(host, port, started)
        return
    for name, value in {"--password-file": password_file, "--reviewer": reviewer}.items():
        if value is not None:
            raise UserError(f"{name} and --demo are mutually exclusive")
    from tunewright.demo import copied_demo

    with copied_demo(run.folder) as copy:
        Studio(copy, "visitor", demo=True).run(host, port, started)


def _password(file: Path) -> str:
    try:
        password = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"The password cannot be read: {error.strerror}", where=str(file)) from None
    except UnicodeDecodeError:
        raise UserError("The password is not UTF-8 text", where=str(file)) from None
    if len(password) < 12:
        raise UserError(f"The password has {len(password)} characters (at least 12)", where=str(file))
    return password
