"""``export``: adapters for other engines, each held to the trained model before it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import Session, session

if TYPE_CHECKING:
    from rich.table import Table

    from tunewright.export.exporting import ExportResult
    from tunewright.export.parity import Figures, Limits

export_app = typer.Typer(
    help="An adapter for other engines: a merged model, GGUF, Ollama. Exit code 3: not as the trained model, not kept.",
    no_args_is_help=True,
)
app.add_typer(export_app, name="export")

Name = Annotated[str | None, typer.Argument(help="An adapter by name (or its beginning).", show_default="the newest")]
To = Annotated[Path | None, typer.Option(help="The folder to be made.", show_default="exports/NAME-…")]
Type = Annotated[Literal["f16", "q8_0"], typer.Option("--type", help="16 bits, or 8 with a scale for each 32.")]


@export_app.command()
def merge(adapter: Name = None, to: To = None, project: Folder = HERE, json: Json = False) -> None:
    """Base and adapter as one model, for transformers and vLLM: added in float32, cast once."""
    import tunewright

    with session(json, project) as current:
        _show(current, tunewright.open(project, current.reporter).export.merge(adapter, to=to))


@export_app.command()
def gguf(
    adapter: Name = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Base and adapter in one file; else the adapter alone, as LoRA.")
    ] = False,
    file_type: Type = "f16",
    to: To = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """The adapter as a GGUF file, alone or merged into its base; llama.cpp runs it before it is kept."""
    import tunewright

    with session(json, project) as current:
        opened = tunewright.open(project, current.reporter).export
        _show(current, opened.gguf(adapter, merged=merged, file_type=file_type, to=to))


@export_app.command()
def ollama(
    adapter: Name = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Base and adapter in files of their own (FROM and ADAPTER); else merged.")
    ] = False,
    file_type: Type = "f16",
    to: To = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """A folder for `ollama create`: GGUF, and a Modelfile with the chat template of training."""
    import tunewright

    with session(json, project) as current:
        opened = tunewright.open(project, current.reporter).export
        _show(current, opened.ollama(adapter, lora=lora, file_type=file_type, to=to))


def _show(current: Session, result: ExportResult) -> None:
    done = "Exported to" if result.made else "There already, and as it was exported:"
    told = f"{done} {result.folder}" if result.good else f"Not kept. Its figures are in {result.numbers}"
    faults = "\n".join(f"Not as the trained model: {fault}." for fault in result.record.shortcomings)
    notes = "\n".join(f"Note: {note}" for note in result.record.notes)
    tables = [_table(result.record.figures, result.record.limits)] if result.record.figures else []
    current.show(result.as_dict(), *tables, *filter(None, (notes, faults)), told)
    raise typer.Exit(0 if result.good else 3)


def _table(found: Figures, limits: Limits) -> Table:
    from rich.table import Table

    from tunewright.metrics.text import score_text

    table = Table(
        title=f"Beside the trained model, on {found.prompts} dev prompts ({found.places} places of its answers)",
        title_justify="left",
    )
    for column in ("", "measured", "allowed"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    scores = [score_text(found.metric, score) for score in (found.score, found.trained_score)]
    table.add_row("mean KL, nats", f"{found.kl:.2g}", f"{limits.kl:g}")
    table.add_row("of the adapter's effect lost", f"{100 * found.lost:.2g}%", f"{100 * limits.lost:g}%")
    table.add_row("largest change of a log-probability", f"{found.max_logit:.2g}", f"{limits.max_logit:g}")
    table.add_row("same likeliest token", f"{100 * found.top1:.1f}%", f"{100 * limits.top1:g}%")
    table.add_row("same greedy answer", f"{100 * found.greedy:.1f}%", f"{100 * limits.greedy:g}%")
    table.add_row("score", scores[0], f"{scores[1]} - {100 * limits.score:g}")
    table.add_row("prompts rendered as in training", f"{found.rendered}", f"{found.prompts}")
    table.add_row("KL from the base, nats", f"{found.from_base:.2g}", "")
    return table
