"""``serve``: the base and its adapters behind an OpenAI-compatible API."""

from __future__ import annotations

from typing import Annotated

import typer

from tunewright.cli.app import DEPLOY, app, command, given_options, refuse_unused
from tunewright.cli.console import Session
from tunewright.serving.options import ServeOptions

EXIT_CODES = {"isolated": 0, "not isolated": 3, "can't tell": 4}


@command(
    app,
    "serve",
    panel=DEPLOY,
    example="tunewright serve --port 8000 --engine vllm",
    status=False,
    database=True,
    traced=False,
    options=ServeOptions,
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
    options: ServeOptions = ServeOptions(),
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

        unused = [name for name in given_options(options) if name != "--engine"]
        refuse_unused("--self-test", dict.fromkeys(unused, True))
        result = run.project.self_test(adapters or (), options)
        run.show(result.as_dict(), *isolation_blocks(result, len(result.models) - 1))
        return EXIT_CODES[result.verdict]
    service = run.project.serve(adapters or (), options)

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
