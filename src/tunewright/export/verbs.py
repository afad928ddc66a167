"""Commands that export adapters for other engines: ``tunewright export …``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.export import CompressedOptions, GgufOptions, HubOptions, OllamaOptions
from tunewright.export.artifact import BuiltArtifact, ExportResult, ExportSource, Kind, export, find_export
from tunewright.models.bases import hub_id
from tunewright.open_project import OpenProject

if TYPE_CHECKING:
    from tunewright.export.hub import HubResult


def merge(project: OpenProject, adapter: str | None = None, *, to: str | Path | None = None) -> ExportResult:
    """Merge base and adapter (the newest by default) into one model, which transformers and vLLM load.

    The result is compared with the trained model on dev prompts, and kept only if it matches. For an adapter
    trained on an NF4 base, both ways to merge are measured and the closer one is kept.

    Args:
        adapter: a name or its beginning (None: the newest).
        to: the output folder (None: exports/NAME-merged).

    Raises:
        UserError: no such adapter, an adapter that does not fit, or a folder with other contents.
    """
    from tunewright.export.merge import build_merged

    source = ExportSource.find(project, adapter)
    made_of = source.inputs("merged")
    return export(source, "merged", source.target("merged", to), made_of, lambda folder: build_merged(folder, source))


def gguf(
    project: OpenProject,
    adapter: str | None = None,
    options: GgufOptions = GgufOptions(),
    *,
    to: str | Path | None = None,
) -> ExportResult:
    """Export the adapter (the newest by default) as a LoRA GGUF file, or merged with its base as one model.

    llama.cpp runs the file on dev prompts. It is kept only if it matches the trained model.

    Args:
        adapter: a name or its beginning (None: the newest).
        options: what the file contains, and its number type.
        to: the output folder (None: exports/NAME-gguf-TYPE, or exports/NAME-merged-gguf-TYPE).

    Raises:
        UserError: llama.cpp is not installed, GGUF does not support the model, or as for :meth:`merge`.
    """
    from tunewright.export.gguf.artifact import build_lora, build_model, require_llamacpp
    from tunewright.export.gguf.model import require_gguf

    require_llamacpp()
    require_gguf(project.base)
    source = ExportSource.find(project, adapter)
    kind: Kind
    what, kind, build = ("gguf", "gguf-lora", build_lora)
    if options.merged:
        what, kind, build = ("merged-gguf", "gguf-merged", build_model)
    made_of = source.inputs(what, file_type=options.file_type)
    target = source.target(f"{what}-{options.file_type}", to)
    return export(source, kind, target, made_of, lambda folder: build(folder, source, options.file_type))


def compressed(
    project: OpenProject,
    adapter: str | None = None,
    options: CompressedOptions = CompressedOptions(),
    *,
    to: str | Path | None = None,
) -> ExportResult:
    """Merge base and adapter (the newest by default) and quantize them with llm-compressor, for vLLM.

    transformers loads the compressed files. They are kept only if they match the trained model.

    Args:
        adapter: a name or its beginning (None: the newest).
        options: the number format: fp8 needs no calibration, and w4a16 is calibrated on training rows.
        to: the output folder (None: exports/NAME-compressed-SCHEME).

    Raises:
        UserError: llm-compressor is not installed, does not support the model or fails, or as for :meth:`merge`.
    """
    from tunewright.export.compressed import build_compressed, compression, require_compressed

    environment = require_compressed(project.base)
    source = ExportSource.find(project, adapter)
    trained_by = source.adapter.lineage.get("config", {}).get("train", {})
    how = compression(
        options.scheme,
        environment,
        project.base,
        project.chat,
        source.version,
        max_length=trained_by.get("max_length", project.folder.config.train.max_length),
        seed=project.folder.config.seed,
    )
    made_of = source.inputs("compressed", **how.inputs)
    target = source.target(f"compressed-{options.scheme}", to)
    return export(source, "compressed", target, made_of, lambda folder: build_compressed(folder, source, how))


def ollama(
    project: OpenProject,
    adapter: str | None = None,
    options: OllamaOptions = OllamaOptions(),
    *,
    to: str | Path | None = None,
) -> ExportResult:
    """Export a folder for ``ollama create``: the GGUF of :meth:`gguf`, and a Modelfile with the training template.

    Args:
        adapter: a name or its beginning (None: the newest).
        options: one file or two, and their number type.
        to: the output folder (None: exports/NAME-ollama-TYPE).

    Raises:
        UserError: as for :meth:`gguf`, or Ollama's template language cannot express the chat template.
    """
    from tunewright.export.ollama import build_ollama, go_template

    lora, file_type = options.lora, options.file_type
    source = ExportSource.find(project, adapter)
    go_template(project.chat)  # refuse unsupported templates before measuring
    if lora:
        project.reporter.warn(
            "Ollama 0.34.1 and newer refuse ADAPTER in a Modelfile: only older versions can create a model from "
            "this folder. Leave out --lora: base and adapter are then merged into one file."
        )
    target = source.target(f"ollama-{'lora-' if lora else ''}{file_type}", to)
    made_of = source.inputs("ollama", lora=lora, file_type=file_type)
    found = find_export(target, made_of)
    if found is not None:  # its GGUF files may be gone by now
        return found
    parts = gguf(project, source.adapter.name, GgufOptions(merged=not lora, file_type=file_type))
    if parts.folder is None:
        return parts
    return export(
        source, "ollama", target, made_of, lambda folder: build_ollama(folder, source, parts, file_type, lora=lora)
    )


def hub(
    project: OpenProject,
    adapter: str | None = None,
    options: HubOptions = HubOptions(),
    *,
    to: str | Path | None = None,
) -> HubResult:
    """Write a repository folder for the Hugging Face hub, with a model card from lineage, evidence and verdict.

    Args:
        adapter: a name or its beginning (None: the newest).
        options: what is published; without ``push`` nothing leaves this machine.
        to: the output folder (None: exports/NAME-hub, or exports/NAME-hub-merged).

    Raises:
        UserError: an id that is not OWNER/NAME, a merged model that differs from the trained one, evidence that was
            changed, a hub that is unreachable or refuses, or as for :meth:`merge`.
    """
    from tunewright.export import hub

    for name, where in ((options.base_model, "--base-model"), (options.push, "--push")):
        if name is not None:
            hub.require_hub_id(name, where)
    source = ExportSource.find(project, adapter)
    tuned, base_model = source.adapter, options.base_model or hub_id(project.base)
    model = merge(project, tuned.name) if options.merged else None
    if model is not None and model.folder is None:
        raise UserError(
            f"The merged model differs from the trained one: {'; '.join(model.record.shortcomings)}",
            where=str(model.numbers),
            fix="Publish the adapter: run the same command without --merged.",
        )
    card, evidence = hub.card(source, model, base_model, options.model_license, options.push)
    target = source.target(f"hub{'-merged' if options.merged else ''}", to)
    made_of = {"kind": "hub", "merged": options.merged, "adapter": tuned.digest, "card": digest(card)}

    def build(folder: Path) -> BuiltArtifact:
        return hub.build_repository(folder, source, model, base_model, card, evidence)

    result = export(source, "hub", target, made_of, build)
    assert result.folder is not None
    message = f"{tuned.name}{f', evidence {evidence}' if evidence else ''}"
    pushed = hub.push(result.folder, options.push, message, private=not options.public) if options.push else None
    return hub.HubResult(result.folder, result.record, result.made, evidence, pushed)
