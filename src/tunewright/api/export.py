"""Commands that export adapters for other engines: ``tunewright export …``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.adapters.compatibility import require_compatible
from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.adapters.system_prompt import system_prompt
from tunewright.api.context import ProjectContext, ProjectGroup, verb
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_text, writing
from tunewright.data.examples import Message
from tunewright.data.versions import DatasetVersion, load_version
from tunewright.models.bases import hub_id

if TYPE_CHECKING:
    from tunewright.export.artifact import ExportResult
    from tunewright.export.compressed import Scheme
    from tunewright.export.gguf.tensors import FileType
    from tunewright.export.hub import HubResult
    from tunewright.export.trained_model import TrainedModel


def merge(project: ProjectContext, adapter: str | None = None, *, to: str | Path | None = None) -> ExportResult:
    """Merge base and adapter (the newest by default) into one model, which transformers and vLLM load.

    The result is compared with the trained model on dev prompts, and kept only if it matches. For an adapter
    trained on an NF4 base, both ways to merge are measured and the closer one is kept.

    Args:
        adapter: a name or its beginning (None: the newest).
        to: the output folder (None: exports/NAME-merged).

    Raises:
        UserError: no such adapter, an adapter that does not fit, or a folder with other contents.
    """
    from tunewright.export.artifact import BuiltArtifact, export, find_export
    from tunewright.export.merge import choose_merge_method, observe_merged, write_merged

    tuned = _find(project, adapter)
    target = _target(project, tuned, "merged", to)
    made_of = _export_inputs(project, tuned, {"kind": "merged"})
    found = find_export(target, made_of)
    if found is not None:
        return found
    trained = _trained(project, tuned)
    weights, way, ways = choose_merge_method(trained, project.reporter)

    def build(folder: Path) -> BuiltArtifact:
        write_merged(folder, weights, project.base, project.chat, trained.system_prompt, project.reporter)
        figures = trained.figures(observe_merged(folder, trained, project.reporter))
        return BuiltArtifact(figures, "16-bit", way, ways, _notes(project, tuned))

    return export(target, "merged", tuned, made_of, build)


def gguf(
    project: ProjectContext,
    adapter: str | None = None,
    *,
    merged: bool = False,
    file_type: FileType = "f16",
    to: str | Path | None = None,
) -> ExportResult:
    """Export the adapter (the newest by default) as a LoRA GGUF file, or ``merged`` with its base as one model.

    llama.cpp runs the file on dev prompts. It is kept only if it matches the trained model.

    Args:
        adapter: a name or its beginning (None: the newest).
        merged: write base and adapter as one file; otherwise the adapter alone, for use with a GGUF of the base.
        file_type: f16, q8_0 (8 bits, one scale per 32 weights), or llama.cpp's mixtures q5_k_m and q4_k_m. An
            adapter alone stays in f16 with the last two: they are the type of its base.
        to: the output folder (None: exports/NAME-gguf-TYPE, or exports/NAME-merged-gguf-TYPE).

    Raises:
        UserError: llama.cpp is not installed, GGUF does not support the model, or as for :meth:`merge`.
    """
    from tunewright.export.gguf.model import require_gguf
    from tunewright.export.llamacpp import require_llamacpp

    require_llamacpp()
    require_gguf(project.base)
    tuned = _find(project, adapter)
    what = "merged-gguf" if merged else "gguf"
    target = _target(project, tuned, f"{what}-{file_type}", to)
    made_of = _export_inputs(project, tuned, {"kind": what, "file_type": file_type})
    return _gguf(project, tuned, target, made_of, merged, file_type)


def compressed(
    project: ProjectContext, adapter: str | None = None, *, scheme: Scheme = "fp8", to: str | Path | None = None
) -> ExportResult:
    """Merge base and adapter (the newest by default) and quantize them with llm-compressor, for vLLM.

    transformers loads the compressed files. They are kept only if they match the trained model.

    Args:
        adapter: a name or its beginning (None: the newest).
        scheme: fp8 (8-bit floats, without calibration), or w4a16 (4-bit integers by GPTQ, calibrated on training
            rows).
        to: the output folder (None: exports/NAME-compressed-SCHEME).

    Raises:
        UserError: llm-compressor is not installed, does not support the model or fails, or as for :meth:`merge`.
    """
    from tunewright.export.artifact import BuiltArtifact, export, find_export
    from tunewright.export.compressed import (
        PRECISIONS,
        compression,
        observe_compressed,
        require_compressed,
        write_compressed,
    )
    from tunewright.export.merge import choose_merge_method

    train = project.folder.config.train
    environment = require_compressed(project.base)
    tuned = _find(project, adapter)
    how = compression(
        scheme,
        environment,
        project.base,
        project.chat,
        _version(project, tuned),
        max_length=tuned.lineage.get("config", {}).get("train", {}).get("max_length", train.max_length),
        seed=project.folder.config.seed,
    )
    target = _target(project, tuned, f"compressed-{scheme}", to)
    made_of = _export_inputs(project, tuned, {"kind": "compressed", **how.inputs})
    found = find_export(target, made_of)
    if found is not None:
        return found
    trained = _trained(project, tuned)
    weights, way, ways = choose_merge_method(trained, project.reporter)

    def build(folder: Path) -> BuiltArtifact:
        write_compressed(folder, how, weights, project.base, project.chat, trained.system_prompt, project.reporter)
        figures = trained.figures(observe_compressed(folder, trained, project.reporter))
        notes = (*how.notes, *_notes(project, tuned))
        return BuiltArtifact(figures, PRECISIONS[scheme], way, ways, notes, packages=how.packages)

    return export(target, "compressed", tuned, made_of, build)


def ollama(
    project: ProjectContext,
    adapter: str | None = None,
    *,
    lora: bool = False,
    file_type: FileType = "f16",
    to: str | Path | None = None,
) -> ExportResult:
    """Export a folder for ``ollama create``: the GGUF of :meth:`gguf`, and a Modelfile with the training template.

    Args:
        adapter: a name or its beginning (None: the newest).
        lora: write base and adapter as separate files; otherwise both merged into one.
        file_type: f16, q8_0, q5_k_m or q4_k_m.
        to: the output folder (None: exports/NAME-ollama-TYPE).

    Raises:
        UserError: as for :meth:`gguf`, or Ollama's template language cannot express the chat template.
    """
    from tunewright.export.artifact import export, find_export
    from tunewright.export.go_template import go_template
    from tunewright.export.ollama import ollama_built

    tuned = _find(project, adapter)
    go_template(project.chat)  # refuse unsupported templates before measuring
    if lora:
        project.reporter.warn(
            "Ollama 0.34.1 and newer refuse ADAPTER in a Modelfile: only older versions can create a model from "
            "this folder. Leave out --lora: base and adapter are then merged into one file."
        )
    target = _target(project, tuned, f"ollama-{'lora-' if lora else ''}{file_type}", to)
    made_of = _export_inputs(project, tuned, {"kind": "ollama", "lora": lora, "file_type": file_type})
    found = find_export(target, made_of)
    if found is not None:
        return found
    parts = gguf(project, tuned.name, merged=not lora, file_type=file_type)
    if parts.folder is None:
        return parts
    base = _base_gguf(project, file_type) if lora else None
    settings = project.folder.config
    return export(
        target,
        "ollama",
        tuned,
        made_of,
        lambda folder: ollama_built(
            folder, parts, base, project.chat, _system_prompt(project, tuned), settings, file_type
        ),
    )


def hub(
    project: ProjectContext,
    adapter: str | None = None,
    *,
    merged: bool = False,
    base_model: str | None = None,
    model_license: str | None = None,
    push: str | None = None,
    public: bool = False,
    to: str | Path | None = None,
) -> HubResult:
    """Write a repository folder for the Hugging Face hub, with a model card from lineage, evidence and verdict.

    Args:
        adapter: a name or its beginning (None: the newest).
        merged: publish the model of :meth:`merge`; otherwise the adapter in PEFT's form.
        base_model: the base's hub id (None: the config's base_model, if that is a hub id).
        model_license: the model's license as the hub names it, such as apache-2.0 (None: none is stated).
        push: the repository OWNER/NAME to create and commit to (None: nothing leaves this machine).
        public: make a new repository public; otherwise it is private.
        to: the output folder (None: exports/NAME-hub, or exports/NAME-hub-merged).

    Raises:
        UserError: an id that is not OWNER/NAME, a merged model that differs from the trained one, evidence that was
            changed, a hub that is unreachable or refuses, or as for :meth:`merge`.
    """
    from tunewright.core.io import write_text
    from tunewright.export import hub
    from tunewright.export.artifact import BuiltArtifact, export, find_export

    for name, where in ((base_model, "--base-model"), (push, "--push")):
        if name is not None:
            hub.require_hub_id(name, where)
    tuned = _find(project, adapter)
    base_model = base_model or hub_id(project.base)
    source = merge(project, tuned.name) if merged else None
    if source is not None and source.folder is None:
        raise UserError(
            f"The merged model differs from the trained one: {'; '.join(source.record.shortcomings)}",
            where=str(source.numbers),
            fix="Publish the adapter: run the same command without --merged.",
        )
    card, evidence = _card(project, tuned, source, base_model, model_license, push)
    target = _target(project, tuned, f"hub{'-merged' if merged else ''}", to)
    made_of = {"kind": "hub", "merged": merged, "adapter": tuned.digest, "card": digest(card)}
    notes = []
    if evidence is None:
        notes.append(f"the card says that there is no evidence: run `tunewright evaluate {tuned.name}`")
    if base_model is None:
        notes.append("the card names no base model, because the base is not a hub id: use --base-model")

    def build(folder: Path) -> BuiltArtifact:
        if source is not None and source.folder is not None:
            hub.copy_merged(folder, source.folder, list(source.record.files))
        else:
            system = _system_prompt(project, tuned)
            hub.write_adapter(folder, tuned, base_model, project.chat, system)
            hub.check_template(folder, project.chat, _dev_prompts(project, tuned), system)
        write_text(folder / hub.CARD, card)
        return BuiltArtifact(source.record.figures if source else None, "16-bit", "original", notes=tuple(notes))

    result = find_export(target, made_of) or export(target, "hub", tuned, made_of, build)
    assert result.folder is not None
    message = f"{tuned.name}{f', evidence {evidence}' if evidence else ''}"
    pushed = hub.push(result.folder, hub.Destination(push, not public), message) if push else None
    return hub.HubResult(result.folder, result.record, result.made, evidence, pushed)


def _card(
    project: ProjectContext,
    tuned: Adapter,
    merged: ExportResult | None,
    base_model: str | None,
    model_license: str | None,
    repository: str | None,
) -> tuple[str, str | None]:
    """Return the model card, and the ID of the evidence in it."""
    from tunewright.evaluation.access_log import load_checked
    from tunewright.evidence.schema import evidence_on
    from tunewright.report.model_card import CardSubject, model_card

    found = evidence_on(project.folder.evaluations, tuned.digest, project.reporter)
    if found is not None:
        folder = project.folder.evaluations
        found = load_checked(folder / found.id, folder, project.reporter)
    subject = CardSubject(
        tuned.name,
        tuned.lineage,
        repository,
        base_model,
        model_license,
        _system_prompt(project, tuned) is not None,
        merged.record.figures if merged else None,
    )
    return model_card(subject, found), found.id if found else None


def _dev_prompts(project: ProjectContext, adapter: Adapter) -> list[Sequence[Message]]:
    """Return the dev prompts of the adapter's dataset; none for one without a known dataset."""
    if "dataset" not in adapter.lineage:
        return []
    version = load_version(project.folder.dataset, adapter.lineage["dataset"]["digest"])
    return [member.example.prompt for member in version.domain_of("dev")]


def _gguf(
    project: ProjectContext, tuned: Adapter, target: Path, made_of: dict[str, Any], merged: bool, file_type: FileType
) -> ExportResult:
    from tunewright.export.artifact import BuiltArtifact, export, find_export
    from tunewright.export.gguf.lora import write_lora
    from tunewright.export.gguf.model import write_model
    from tunewright.export.gguf.tensors import PRECISIONS
    from tunewright.export.llamacpp import EngineFailedError, observe_gguf
    from tunewright.export.merge import choose_merge_method
    from tunewright.export.templates import TEMPLATE_FILE, exported_template
    from tunewright.export.weights import Weights, read_deltas, trained_dtype

    found = find_export(target, made_of)
    if found is not None:
        return found
    reporter = project.reporter
    trained = _trained(project, tuned)

    def build(folder: Path) -> BuiltArtifact:
        # An adapter's matrices are small and rounding them costs more: only its base is in a K-quant.
        lora_type: FileType = file_type if file_type in ("f16", "q8_0") else "f16"
        path = folder / f"{tuned.name}-{file_type if merged else f'lora-{lora_type}'}.gguf"
        if merged:
            weights, way, ways = choose_merge_method(trained, reporter)
            notes = write_model(
                path,
                tuned.name,
                weights,
                project.base,
                project.chat,
                file_type,
                reporter,
                system_prompt=trained.system_prompt,
            )
            model, lora = path, None
        else:
            changed = Weights(project.base, trained_dtype(tuned), read_deltas(tuned.folder))
            way, ways = "original", ()
            notes = write_lora(path, tuned.name, changed, project.base, lora_type, reporter)
            if lora_type != file_type:
                notes.append(f"the adapter's file is in {lora_type}; its base was in {file_type}")
            if project.chat.template.tools == "hermes":
                # Another GGUF file of the base has the base's own template, without a form of functions.
                write_text(folder / TEMPLATE_FILE, exported_template(project.chat))
                notes.append(f"for functions, give llama.cpp the template too: --chat-template-file {TEMPLATE_FILE}")
            model, lora = _base_gguf(project, file_type), path
        figures, failure = None, None
        try:
            figures = trained.figures(observe_gguf(model, trained, reporter, lora))
        except EngineFailedError as error:
            failure = str(error)
        notes += _notes(project, tuned, template=merged)
        return BuiltArtifact(figures, PRECISIONS[file_type], way, ways, tuple(notes), failure)

    return export(target, "gguf-merged" if merged else "gguf-lora", tuned, made_of, build)


def _base_gguf(project: ProjectContext, file_type: FileType) -> Path:
    """Return the base as a GGUF file, cached in the working folder."""
    from tunewright.export.gguf.model import write_model
    from tunewright.export.weights import Weights

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


def _find(project: ProjectContext, adapter: str | None) -> Adapter:
    found = find_adapter(project.folder.adapters, adapter)
    require_compatible(found, project.base, project.chat)
    return found


def _target(project: ProjectContext, adapter: Adapter, what: str, to: str | Path | None) -> Path:
    return project.folder.exports / f"{adapter.name}-{what}" if to is None else Path(to).expanduser()


def _export_inputs(project: ProjectContext, adapter: Adapter, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs that determine the export."""
    system = _system_prompt(project, adapter)
    return {
        **({} if system is None else {"system_prompt": system}),
        "adapter": adapter.digest,
        "base": project.base.digest,
        "template": project.chat.digest,
        "dataset": adapter.dataset or _version(project, adapter).digest,
        **settings,
    }


def _version(project: ProjectContext, adapter: Adapter) -> DatasetVersion:
    """Return the version that the adapter was trained on; of a foreign adapter, whose data is unknown, the current
    one, whose prompts serve as well to compare an artifact with the trained model."""
    return load_version(project.folder.dataset, adapter.dataset)


def _system_prompt(project: ProjectContext, adapter: Adapter) -> str | None:
    """Return the adapter's trained system prompt; None if it has none or it is unknown."""
    return system_prompt(adapter, project.folder.dataset).text


def _notes(project: ProjectContext, adapter: Adapter, *, template: bool = True) -> tuple[str, ...]:
    """Return notes on precision and system prompt; ``template``: the export includes a chat template."""
    foreign = (
        ()
        if "config" in adapter.lineage
        else ("bfloat16 is assumed: the adapter's lineage does not name the precision of its training",)
    )
    prompt = system_prompt(adapter, project.folder.dataset)
    if prompt.text is not None and template:
        note = f"its chat template adds the trained system prompt if there is no other: {prompt.shown}"
    elif prompt.text is not None:
        note = f"the adapter's file alone has no system prompt: send the trained one: {prompt.text}"
    elif prompt.why_none is not None:
        note = f"no system prompt is written into it: {prompt.why_none}"
    else:
        return foreign
    return (*foreign, note)


def _trained(project: ProjectContext, adapter: Adapter) -> TrainedModel:
    """Return the trained model on dev prompts of the version that it was trained on."""
    from tunewright.export.probe import draw_probe
    from tunewright.export.trained_model import measure_trained
    from tunewright.metrics import open_scorers
    from tunewright.models.loading import context_length

    config = project.folder.config
    version = _version(project, adapter)
    system = _system_prompt(project, adapter)
    probe = draw_probe(version, project.chat, config, context_length(project.base), system, project.reporter)
    scorer = open_scorers(config.evaluate, project.folder.root)[0]
    return measure_trained(project.base, adapter, project.chat, system, probe, scorer, project.reporter)


class ProjectExport(ProjectGroup):
    """Verbs that export a project's adapters for other engines."""

    compressed = verb(compressed)
    gguf = verb(gguf)
    hub = verb(hub)
    merge = verb(merge)
    ollama = verb(ollama)
