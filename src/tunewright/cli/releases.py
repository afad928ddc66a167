"""``deploy``, ``promote``, ``rollback``, ``withdraw``, ``releases``: which adapter an alias answers with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import session
from tunewright.cli.serve import Engine
from tunewright.cli.state import StateUrl, project_at

if TYPE_CHECKING:
    from tunewright.api.releases import DeployResult
    from tunewright.cli.console import Session

Alias = Annotated[str, typer.Argument(help="The name that tenants ask for.")]
TestedOn = Annotated[
    Engine | None,
    typer.Option("--engine", help="What the isolation test runs on.", show_default="the config's serve.engine"),
]
Untested = Annotated[
    str | None,
    typer.Option(help="Leave the isolation test out, for this reason, which is kept.", metavar="WHY"),
]


@app.command()
def deploy(
    alias: Alias,
    adapter: Annotated[str, typer.Argument(help="The adapter's name, or its beginning.")],
    canary: Annotated[
        str | None, typer.Option(help="Try it on this share of the traffic, such as 10%.", show_default="all")
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Ask it too, and record what it says; it is not heard.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Whatever its verdict; needs --because.")] = False,
    because: Annotated[str | None, typer.Option(help="Why, for the history.")] = None,
    no_system_prompt: Annotated[
        bool,
        typer.Option(
            "--no-system-prompt",
            help="Do not add the trained system prompt to requests that have no system message.",
        ),
    ] = False,
    engine: TestedOn = None,
    untested: Untested = None,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Have an alias answer with an adapter whose verdict is to ship; running servers take it within a second.

    First the isolation test runs with all that is live: is each request answered by its own adapter? Exit code 3 if the
    verdict is not to ship or the test finds a wrong answer, 4 if it can't be told: then no alias has changed.
    """
    from tunewright.cli.tables import verdict_text
    from tunewright.core.errors import UserError
    from tunewright.serving.state.times import percent

    with session(json, project) as current:
        if force != (because is not None):
            where = "--force" if force else "--because"
            raise UserError("--force and --because go together", where=where, fix="Give both, or neither of them.")
        share = None if canary is None else percent(canary, "--canary")
        opened = project_at(current, project, state)
        result = opened.deploy(
            alias,
            adapter,
            canary=share,
            shadow=shadow,
            because=because,
            engine=engine.value if engine else None,
            untested=untested,
            system_prompt=not no_system_prompt,
        )
        if result.release is None and result.isolation is None:
            assert result.verdict is not None
            current.show(result.as_dict(), verdict_text(result.verdict), f"{alias} is as it was.")
            raise typer.Exit(result.exit_code)
        _show(current, alias, result)


@app.command()
def promote(
    alias: Alias,
    engine: TestedOn = None,
    untested: Untested = None,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Have an alias answer with its candidate from now on; what is live is tested together, if it has not been yet."""
    with session(json) as current:
        opened = project_at(current, project, state)
        _show(current, alias, opened.promote(alias, engine=engine.value if engine else None, untested=untested))


def _show(current: Session, alias: str, result: DeployResult) -> None:
    """What became of it; ends with the exit code where it did not pass the isolation test."""
    from tunewright.cli.isolation_tables import isolation_table
    from tunewright.cli.tenant_tables import releases_tables

    if result.release is None:
        assert result.isolation is not None
        table = isolation_table(result.isolation, len(result.isolation.adapters))
        current.show(result.as_dict(), *table, f"{alias} is as it was.")
        raise typer.Exit(result.exit_code)
    running = f"{result.servers} running servers take it." if result.servers != 1 else "The running server takes it."
    told = running if result.servers else "No server is running: `tunewright serve` starts one."
    current.show(result.as_dict(), *releases_tables([result.release]), told)


@app.command()
def rollback(
    alias: Alias,
    to: Annotated[
        int | None, typer.Option(min=1, help="The release to bring back, by its number.", show_default="the one before")
    ] = None,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Let an alias's candidate go; where there is none, bring back what it answered with before."""
    from tunewright.cli.tenant_tables import releases_tables

    with session(json) as current:
        made = project_at(current, project, state).rollback(alias, to)
        current.show(made.as_dict(), *releases_tables([made]))


@app.command()
def withdraw(
    alias: Alias,
    because: Annotated[str | None, typer.Option(help="Why, for the history.")] = None,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Have an alias answer nothing any more, as one that is not there; `rollback` or `deploy` brings it back."""
    from tunewright.cli.tenant_tables import releases_tables

    with session(json) as current:
        made = project_at(current, project, state).withdraw(alias, because=because)
        current.show(made.as_dict(), *releases_tables([made]))


@app.command()
def shadow(alias: Alias, state: StateUrl = None, project: Folder = HERE, json: Json = False) -> None:
    """What candidates in an alias's shadow would have answered, beside what was answered."""
    from tunewright.cli.tenant_tables import shadow_tables

    with session(json) as current:
        lines = project_at(current, project, state).shadow(alias)
        current.show({"asked": [line.as_dict() for line in lines]}, *shadow_tables(lines))


@app.command()
def releases(
    alias: Annotated[str | None, typer.Argument(help="An alias.", show_default="all")] = None,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """List the releases: what each alias answered with, from when on, and why it might."""
    from tunewright.cli.tenant_tables import releases_tables

    with session(json) as current:
        known = project_at(current, project, state).releases(alias)
        document = {"releases": [release.as_dict() for release in known]}
        current.show(document, *(releases_tables(known) if known else ["Nothing has been released yet."]))
