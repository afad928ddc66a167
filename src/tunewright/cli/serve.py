"""``serve``: the base and its adapters behind an OpenAI-compatible API."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from tunewright.cli.app import DEPLOY, app, command, refuse_unused
from tunewright.cli.console import Session

EXIT_CODES = {"isolated": 0, "not isolated": 3, "can't tell": 4}


Engine = Literal["peft", "vllm", "llamacpp"]


@command(
    app,
    "serve",
    panel=DEPLOY,
    example="tunewright serve --port 8000 --engine vllm",
    status=False,
    database=True,
    traced=False,
)
def serve(
    run: Session,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapter names or their first characters, without tenants; NAME@step-N is an earlier checkpoint.",
            show_default="all that fit the base",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.", show_default="serve.host in the config")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port to listen on; 0 for any.", show_default="serve.port in the config"),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port of Prometheus metrics; 0 for any.",
            show_default="serve.metrics_port in the config",
        ),
    ] = None,
    metrics_host: Annotated[
        str | None,
        typer.Option(help="Address of the metrics port.", show_default="serve.metrics_host in the config"),
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option("--no-auth", help="Without tenants: accept everyone, even on an address reachable by others."),
    ] = False,
    no_system_prompt: Annotated[
        bool,
        typer.Option(
            "--no-system-prompt",
            help="Without tenants: do not add the trained system prompt to requests without a system message.",
        ),
    ] = False,
    constrain: Annotated[
        bool,
        typer.Option(
            "--constrain", help="Without tenants: constrain the adapters' answers by evaluate.structured_outputs."
        ),
    ] = False,
    engine: Annotated[
        Engine | None, typer.Option(help="Inference engine.", show_default="serve.engine in the config")
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Number of engines, each in its own process: one GPU each, or a share of the processor's threads.",
            show_default="serve.replicas in the config",
        ),
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Largest number of engines, which follows the load between --replicas and this one.",
            show_default="serve.max_replicas in the config",
        ),
    ] = None,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            help="Do not serve, but test that each request is answered by its own adapter. Exit code 3: one was not; "
            "4: some adapters give the same answers and are indistinguishable.",
        ),
    ] = False,
) -> int | None:
    """Serve the base and its adapters from one copy of the base until Ctrl-C.

    With tenants, each tenant's keys reach the releases of its aliases. Without tenants, everyone on this machine
    reaches every adapter.
    """
    if self_test:
        from tunewright.gate.results import isolation_blocks

        listening = {"--host": host, "--port": port, "--metrics-port": metrics_port, "--metrics-host": metrics_host}
        gateway = {"--no-auth": no_auth, "--no-system-prompt": no_system_prompt, "--constrain": constrain}
        refuse_unused("--self-test", {**{name: given is not None for name, given in listening.items()}, **gateway})
        result = run.project.self_test(adapters or (), engine=engine, replicas=replicas, max_replicas=max_replicas)
        run.show(result.as_dict(), *isolation_blocks(result, len(result.models) - 1))
        return EXIT_CODES[result.verdict]
    service = run.project.serve(
        adapters or (),
        host=host,
        port=port,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        auth=not no_auth,
        engine=engine,
        replicas=replicas,
        max_replicas=max_replicas,
        system_prompts=not no_system_prompt,
        constrain=constrain,
    )

    run.report_review_status(run.folder)

    def started(url: str) -> None:
        models = "\n".join(f"  {name}" for name in service.models)
        metrics = f"Prometheus metrics: {service.metrics_url}\n" if service.metrics_url else ""
        run.show(
            {
                "url": url,
                "models": service.models,
                "system_prompts": service.system_prompts,
                "metrics": service.metrics_url,
            },
            f"Serving at {url}/v1\n{models}\n{metrics}Ctrl-C stops the server.",
        )

    service.run(started)
    return None
