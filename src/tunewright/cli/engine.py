"""``engine``: engines that have an environment of their own."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import Json, app
from tunewright.cli.console import RESUMES, session

if TYPE_CHECKING:
    from tunewright.engines.vllm.environment import Environment

engine = typer.Typer(help="Engines that are installed beside tunewright.", no_args_is_help=True)
app.add_typer(engine, name="engine")

Name = Annotated[str, typer.Argument(help="The engine: vllm.", show_default=False)]


class Build(StrEnum):
    """Which build of vLLM."""

    cpu = "cpu"
    cuda = "cuda"


@engine.command()
def install(
    name: Name,
    to: Annotated[
        Path | None, typer.Option(help="The environment's folder.", show_default="in your cache", file_okay=False)
    ] = None,
    build: Annotated[
        Build | None, typer.Option(help="With CUDA or without.", show_default="cuda where a GPU answers")
    ] = None,
    torch_index: Annotated[
        str | None,
        typer.Option(help="Where PyTorch's builds without CUDA are.", show_default="where pip looks anyway"),
    ] = None,
    json: Json = False,
) -> None:
    """Make the engine's own environment; the same command goes on where it was cut off."""
    from tunewright.api.engines import EnginesApi
    from tunewright.core.progress import Reporter

    with session(json, kept=RESUMES) as current:
        reporter: Reporter = current.reporter
        made = EnginesApi(reporter).install(name, to=to, build=build.value if build else None, torch_index=torch_index)
        current.show(made.as_dict(), _told(made))


@engine.command()
def show(name: Name, json: Json = False) -> None:
    """Where the engine's environment is, and what is in it."""
    from tunewright.api.engines import EnginesApi

    with session(json) as current:
        found = EnginesApi(current.reporter).show(name)
        current.show(found.as_dict(), _told(found))


def _told(environment: Environment) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items() if name != "cuda")
    return f"vLLM ({environment.build}) is ready in {environment.folder}: {versions}"
