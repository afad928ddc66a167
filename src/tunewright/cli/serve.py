"""``serve``: the base and its adapters behind an OpenAI-compatible API."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import session
from tunewright.cli.isolation_tables import EXIT_CODES, isolation_table
from tunewright.cli.state import StateUrl, project_at

if TYPE_CHECKING:
    from tunewright.config import EngineName


class Engine(StrEnum):
    """What computes the answers."""

    peft = "peft"
    vllm = "vllm"
    llamacpp = "llamacpp"


@app.command()
def serve(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapters by name (or its beginning), without tenants; NAME@step-N is an earlier checkpoint.",
            show_default="all that fit the base",
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="the config's")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0: any.", show_default="the config's")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port for Prometheus; 0: any.", show_default="the config's, if any"),
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option("--no-auth", help="Without tenants: answer everybody, on an address that others can reach, too."),
    ] = False,
    no_system_prompt: Annotated[
        bool,
        typer.Option(
            "--no-system-prompt",
            help="Without tenants: do not add the trained system prompt to requests that have no system message.",
        ),
    ] = False,
    engine: Annotated[
        Engine | None, typer.Option(help="What computes the answers.", show_default="the config's serve.engine")
    ] = None,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            help="Serve nobody: test that no request is answered by another adapter than its own; 3: one was, 4: "
            "adapters that answer alike cannot be told apart.",
        ),
    ] = False,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Serve from one copy of the base, until Ctrl-C: aliases to tenants, or without tenants all to this machine."""
    with session(json) as current:
        opened = project_at(current, project, state)
        kind: EngineName | None = engine.value if engine else None
        if self_test:
            result = opened.self_test(adapters or (), engine=kind)
            current.show(result.as_dict(), *isolation_table(result, len(result.models) - 1))
            raise typer.Exit(EXIT_CODES[result.verdict])
        service = opened.serve(
            adapters or (),
            host=host,
            port=port,
            metrics_port=metrics_port,
            auth=not no_auth,
            engine=kind,
            system_prompts=not no_system_prompt,
        )

        current.tell_standing(project)

        def started(url: str) -> None:
            models = "\n".join(f"  {name}" for name in service.models)
            metrics = f"For Prometheus: {service.metrics_url}\n" if service.metrics_url else ""
            current.show(
                {
                    "url": url,
                    "models": service.models,
                    "system_prompts": service.system_prompts,
                    "metrics": service.metrics_url,
                },
                f"Serving at {url}/v1\n{models}\n{metrics}Ctrl-C stops the server.",
            )

        service.run(started)
