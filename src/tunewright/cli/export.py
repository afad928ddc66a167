"""``export``: adapters for other engines, each compared with the trained model before it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import DEPLOY, Adapter, command, group
from tunewright.cli.console import MEASURED_NO, Session
from tunewright.core.errors import UserError
from tunewright.export import CompressedOptions, GgufOptions, HubOptions, OllamaOptions

if TYPE_CHECKING:
    from tunewright.export.artifact import ExportResult

export_app = group(
    "export",
    DEPLOY,
    "Export an adapter for transformers, vLLM, llama.cpp, Ollama or the hub. Exit code 3: it differs; nothing kept.",
)

To = Annotated[Path | None, typer.Option(help="Folder to create.", show_default="exports/NAME-…")]


@command(export_app, "merge", loads=True, example="tunewright export merge legal-4f1c02a9 --to merged")
def merge(run: Session, adapter: Adapter = None, to: To = None) -> int | None:
    """Merge base and adapter into one model for transformers and vLLM: added in float32, cast once."""
    return _show(run, run.project.export.merge(adapter, to=to))


@command(export_app, "gguf", loads=True, example="tunewright export gguf --merged --type q8_0", options=GgufOptions)
def gguf(run: Session, adapter: Adapter = None, options: GgufOptions = GgufOptions(), to: To = None) -> int | None:
    """Write the adapter as a GGUF file, alone or merged into its base, and test it in llama.cpp before keeping it."""
    return _show(run, run.project.export.gguf(adapter, options, to=to))


@command(
    export_app,
    "compressed",
    loads=True,
    example="tunewright export compressed --scheme w4a16",
    options=CompressedOptions,
)
def compressed(
    run: Session, adapter: Adapter = None, options: CompressedOptions = CompressedOptions(), to: To = None
) -> int | None:
    """Merge base and adapter, and quantize them with llm-compressor for vLLM (compressed-tensors)."""
    return _show(run, run.project.export.compressed(adapter, options, to=to))


@command(export_app, "ollama", loads=True, example="tunewright export ollama legal-4f1c02a9", options=OllamaOptions)
def ollama(
    run: Session, adapter: Adapter = None, options: OllamaOptions = OllamaOptions(), to: To = None
) -> int | None:
    """Write a folder for `ollama create`: GGUF and a Modelfile with the chat template used in training."""
    return _show(run, run.project.export.ollama(adapter, options, to=to))


@command(
    export_app,
    "hub",
    loads=True,
    example="tunewright export hub --base-model meta-llama/Llama-3.1-8B-Instruct",
    options=HubOptions,
)
def hub(
    run: Session,
    adapter: Adapter = None,
    options: HubOptions = HubOptions(),
    to: To = None,
) -> None:
    """Write a repository folder for the Hugging Face hub, with a model card made from lineage, evidence and verdict."""
    if options.public and options.push is None:
        raise UserError("`--public` requires `--push`", where="--public")
    result = run.project.export.hub(adapter, options, to=to)
    done = "Written to" if result.made else "Already written and unchanged:"
    notes = [f"Note: {note}" for note in result.record.notes]
    pushed = f"Pushed: {result.pushed}" if result.pushed else "Nothing was pushed (--push OWNER/NAME does)."
    run.show(result.as_dict(), *notes, f"{done} {result.folder}", pushed)


def _show(run: Session, result: ExportResult) -> int | None:
    from tunewright.gate.results import figures_blocks

    done = "Exported to" if result.made else "Already exported and unchanged:"
    text = f"{done} {result.folder}" if result.good else f"Not kept. Its figures are in {result.numbers}"
    record = result.record
    notes = [f"Note: {note}" for note in record.notes]
    faults = [f"Differs from the trained model: {fault}." for fault in record.shortcomings]
    figures = figures_blocks(record.figures, record.limits) if record.figures else ()
    run.show(result.as_dict(), *figures, *notes, *faults, text)
    return None if result.good else MEASURED_NO
