"""``init``, ``config``, ``run`` and ``demo``: the project as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import RESUMES, session

config_app = typer.Typer(help="The config's schema and resolved values.", no_args_is_help=True)
app.add_typer(config_app, name="config")


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="The new project's folder.")] = HERE,
    example: Annotated[str | None, typer.Option(help="Write a complete, runnable example: legal-citations.")] = None,
    json: Json = False,
) -> None:
    """Write a commented tunewright.yaml, or a whole example project."""
    from tunewright.config.io import write_config
    from tunewright.config.project import CONFIG_FILE, create_project
    from tunewright.demo import example_files

    with session(json) as current:
        files = example_files(example) if example else {CONFIG_FILE: write_config({})}
        create_project(directory, files)
        next_step = "tunewright run" if example else "edit it, then: tunewright data add FILE"
        current.show(
            {"project": str(directory), "files": sorted(files)},
            f"Wrote {', '.join(sorted(files))} in {directory.resolve()}\nNext: {next_step}",
        )


@config_app.command("schema")
def config_schema() -> None:
    """Print the config's JSON Schema, for editors."""
    from tunewright.config import Config

    with session(as_json=False) as current:
        current.print_out(json.dumps(Config.model_json_schema(), indent=2) + "\n")


@config_app.command("show")
def config_show(project: Folder = HERE, json: Json = False) -> None:
    """Print every resolved value of the config, presets and defaults filled in."""
    import yaml

    import tunewright

    with session(json) as current:
        values = tunewright.open(project).folder.config.model_dump(mode="json")
        current.show(values, yaml.safe_dump(values, sort_keys=False).rstrip())


@app.command()
def run(
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Continue with fewer than 50 training pairs, or with a test split too small for any verdict.",
        ),
    ] = False,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Go the whole road: data, advise, train, evaluate, verdict, report. Goes on where it was stopped."""
    import tunewright
    from tunewright.cli.tables import run_document, run_tables

    with session(json, project, kept=RESUMES) as current:
        result = tunewright.open(project, current.reporter).run(force=force)
        current.show(run_document(result), *run_tables(result))
        raise typer.Exit(result.verdict.exit_code)


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(help="Where the demo project goes.")] = Path("tunewright-demo"),
    whole: Annotated[
        bool, typer.Option("--whole", help="Then a pilot, a learning curve and a judge: an hour more.")
    ] = False,
    json: Json = False,
) -> None:
    """The example project, the whole road, a held-out question answered three ways, and two tenants on one server."""
    from tunewright.cli.advice_tables import advice_tables
    from tunewright.cli.judge_tables import judgement_tables
    from tunewright.cli.tables import answers_table, run_document, run_tables
    from tunewright.cli.tenant_tables import two_tenants_tables
    from tunewright.cli.training_tables import curve_tables
    from tunewright.demo import ask_three_ways, measure_the_rest, open_demo
    from tunewright.demo_tenants import show_two_tenants

    with session(json, directory, kept=RESUMES) as current:
        opened = open_demo(directory, current.reporter)
        result = opened.run()
        answered = ask_three_ways(opened, result)
        tenants = show_two_tenants(opened, result)
        document = {
            **run_document(result),
            "served": answered.as_dict(),
            "tenants": tenants.as_dict() if tenants else None,
        }
        shown = [*run_tables(result), answers_table(answered), *(two_tenants_tables(tenants) if tenants else [])]
        if whole:
            rest = measure_the_rest(opened, result.evaluated.folder)
            document |= rest.as_dict()
            shown += [*advice_tables(rest.advice), *curve_tables(rest.curve.curve)]
            shown += [*judgement_tables(rest.judged.judgement), f"Report: {rest.report}"]
        current.show(document, *shown)
        raise typer.Exit(result.verdict.exit_code)
