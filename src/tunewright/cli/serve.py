"""``serve``: the base and its adapters behind an OpenAI-compatible API."""

from __future__ import annotations

from typing import Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import session
from tunewright.cli.state import StateUrl, road_at


@app.command()
def serve(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapters by name (or its beginning), without tenants; NAME@step-N is an earlier checkpoint.",
            show_default="all that fit the base",
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="the recipe's")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0: any.", show_default="the recipe's")
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option("--no-auth", help="Without tenants: answer everybody, on an address that others can reach, too."),
    ] = False,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Serve from one copy of the base, until Ctrl-C: aliases to tenants, or without tenants all to this machine."""
    with session(json) as current:
        road = road_at(current, project, state)
        service = road.serve(adapters or (), host=host, port=port, auth=not no_auth)

        current.tell_standing(project)

        def started(url: str) -> None:
            models = "\n".join(f"  {name}" for name in service.models)
            current.show(
                {"url": url, "models": service.models}, f"Serving at {url}/v1\n{models}\nCtrl-C stops the server."
            )

        service.run(started)
