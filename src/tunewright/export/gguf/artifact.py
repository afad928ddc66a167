"""GGUF files of an adapter, alone or merged into its base, each run by llama.cpp."""

from __future__ import annotations

from pathlib import Path

from tunewright.core.io import digest, write_text, writing
from tunewright.core.progress import Reporter
from tunewright.export.artifact import BuiltArtifact
from tunewright.export.gguf.lora import write_lora
from tunewright.export.gguf.model import write_model
from tunewright.export.gguf.tensors import PRECISIONS, FileType
from tunewright.export.llamacpp import EngineFailedError, observe_gguf
from tunewright.export.merge import choose_merge_method
from tunewright.export.source import Source
from tunewright.export.templates import TEMPLATE_FILE, exported_template
from tunewright.export.trained_model import TrainedModel, measure_trained
from tunewright.export.weights import Weights, read_deltas, trained_dtype
from tunewright.gate.parity import Figures
from tunewright.open_project import OpenProject


def build_model(folder: Path, source: Source, file_type: FileType) -> BuiltArtifact:
    """Write base and adapter as one file."""
    project, name = source.project, source.adapter.name
    trained = measure_trained(source)
    weights, way, ways = choose_merge_method(trained, project.reporter)
    path = folder / f"{name}-{file_type}.gguf"
    prompt = trained.system_prompt
    notes = write_model(
        path, name, weights, project.base, project.chat, file_type, project.reporter, system_prompt=prompt
    )
    figures, failure = _figures(trained, project.reporter, path)
    return BuiltArtifact(figures, PRECISIONS[file_type], way, ways, (*notes, *source.notes()), failure)


def build_lora(folder: Path, source: Source, file_type: FileType) -> BuiltArtifact:
    """Write the adapter's matrices as a file to load on a GGUF file of its base, which is in ``file_type``."""
    project, adapter = source.project, source.adapter
    trained = measure_trained(source)
    # An adapter's matrices are small and rounding them costs more: only its base is in a K-quant.
    lora_type: FileType = file_type if file_type in ("f16", "q8_0") else "f16"
    path = folder / f"{adapter.name}-lora-{lora_type}.gguf"
    changed = Weights(project.base, trained_dtype(adapter), read_deltas(adapter.folder))
    notes = write_lora(path, adapter.name, changed, project.base, lora_type, project.reporter)
    if lora_type != file_type:
        notes.append(f"the adapter's file is in {lora_type}; its base was in {file_type}")
    if project.chat.template.tools == "hermes":
        # Another GGUF file of the base has the base's own template, without a form of functions.
        write_text(folder / TEMPLATE_FILE, exported_template(project.chat))
        notes.append(f"for functions, give llama.cpp the template too: --chat-template-file {TEMPLATE_FILE}")
    figures, failure = _figures(trained, project.reporter, base_file(project, file_type), path)
    notes += source.notes(template=False)
    return BuiltArtifact(figures, PRECISIONS[file_type], "original", (), tuple(notes), failure)


def _figures(
    trained: TrainedModel, reporter: Reporter, model: Path, lora: Path | None = None
) -> tuple[Figures | None, str | None]:
    """Return the figures of the files in llama.cpp; if it rejects them, None and the reason."""
    try:
        return trained.figures(observe_gguf(model, trained, reporter, lora)), None
    except EngineFailedError as error:
        return None, str(error)


def base_file(project: OpenProject, file_type: FileType) -> Path:
    """Return the base as a GGUF file, cached in the working folder."""
    identity = digest({"base": project.base.digest, "template": project.chat.digest})[:12]
    path = project.folder.work / "export" / f"base-{identity}-{file_type}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}")
        base = Weights(project.base, "float32", {})
        with writing(path):
            write_model(aside, project.base.spec, base, project.base, project.chat, file_type, project.reporter)
            aside.replace(path)
    return path
