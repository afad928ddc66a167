"""``engine``: inference engines with their own environment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tunewright.cli.app import DEPLOY, command, group
from tunewright.cli.console import RESUMES, Session
from tunewright.serving.options import EngineOptions

if TYPE_CHECKING:
    from tunewright.engines.environment import Environment

engine = group("engine", DEPLOY, "Install vLLM or llm-compressor, or serve one engine to servers on other machines.")

Name = Annotated[str, typer.Argument(help="vllm or llmcompressor.", show_default=False)]


@command(
    engine, "install", example="tunewright engine install vllm --build cpu", status=False, project=False, kept=RESUMES
)
def install(
    run: Session,
    name: Name,
    to: Annotated[
        Path | None, typer.Option(help="Folder of the environment.", show_default="in your cache", file_okay=False)
    ] = None,
    build: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="With CUDA or without.", show_default="cuda if a GPU is present"),
    ] = None,
    torch_index: Annotated[
        str | None,
        typer.Option(help="Package index with PyTorch's builds without CUDA.", show_default="pip's own"),
    ] = None,
) -> None:
    """Create the engine's environment. Resumes where it stopped."""
    from tunewright.engines import environment

    tool = environment.find_tool(name)
    made = environment.install(tool, run.reporter, to=to, build=build, torch_index=torch_index)
    run.show(made, _summary(made))


@command(engine, "show", example="tunewright engine show vllm", status=False, project=False)
def show(run: Session, name: Name) -> None:
    """Show where the engine's environment is and what is installed in it."""
    from tunewright.engines import environment

    found = environment.find(environment.find_tool(name))
    run.show(found, _summary(found))


@command(
    engine,
    "serve",
    example="tunewright engine serve --host 0.0.0.0 --engine vllm",
    loads=True,
    status=False,
    database=True,
    traced=False,
    options=EngineOptions,
)
def serve(run: Session, options: EngineOptions = EngineOptions()) -> None:
    """Serve one engine with the project's adapters to `tunewright serve` on other machines until Ctrl-C.

    List its address in their serve.engines. The environment variable TUNEWRIGHT_ENGINE_TOKEN holds the secret of both.
    """
    service = run.project.serve_engine(options)
    service.run(lambda url: run.show({"url": url}, f"The engine is at {url}\nCtrl-C stops it."))


def _summary(environment: Environment) -> str:
    from tunewright.engines.environment import TOOLS

    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items() if name != "cuda")
    return f"{TOOLS[environment.tool].title} ({environment.build}) is ready in {environment.folder}: {versions}"
