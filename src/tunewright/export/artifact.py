"""Export of a trained adapter: the artifact is built in a temporary folder, measured, and kept only if it passes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from tunewright.adapters.lineage import SystemPrompt, packages, system_prompt
from tunewright.adapters.registry import Adapter, find_adapter, require_compatible, trained_quantization
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import digest, file_digest, new_folder, write_json
from tunewright.core.locks import in_use, remove_abandoned
from tunewright.data.examples import Message
from tunewright.data.versions import DatasetVersion, load_version
from tunewright.evidence.common import Part
from tunewright.gate.results import LIMITS, Figures, Limits, Precision, shortcomings
from tunewright.open_project import OpenProject


@dataclass(frozen=True)
class ExportSource:
    """An adapter of an open project, to be exported."""

    project: OpenProject
    adapter: Adapter

    @classmethod
    def find(cls, project: OpenProject, adapter: str | None) -> ExportSource:
        """Return an adapter by its name or the beginning of it; None means the newest."""
        found = find_adapter(project.folder.adapters, adapter)
        require_compatible(found, project.base, project.chat)
        return cls(project, found)

    @cached_property
    def version(self) -> DatasetVersion:
        """The version that the adapter was trained on; for a foreign adapter (unknown data) the current one."""
        return load_version(self.project.folder.dataset, self.adapter.dataset)

    @cached_property
    def system_prompt(self) -> SystemPrompt:
        """The adapter's trained system prompt, or the reason for its absence."""
        return system_prompt(self.adapter, self.project.folder.dataset)

    @property
    def dev_prompts(self) -> list[Sequence[Message]]:
        """The dev prompts of the adapter's dataset; empty if its dataset is unknown."""
        if "dataset" not in self.adapter.lineage:
            return []
        return [member.example.prompt for member in self.version.domain_of("dev")]

    def target(self, what: str, to: str | Path | None) -> Path:
        """Return the folder to create: ``to``, or one in the project's exports."""
        return self.project.folder.exports / f"{self.adapter.name}-{what}" if to is None else Path(to).expanduser()

    def inputs(self, kind: str, **settings: Any) -> dict[str, Any]:
        """Return the inputs that determine the artifact."""
        system = self.system_prompt.text
        return {
            **({} if system is None else {"system_prompt": system}),
            "adapter": self.adapter.digest,
            "base": self.project.base.digest,
            "template": self.project.chat.digest,
            "dataset": self.adapter.dataset or self.version.digest,
            "kind": kind,
            **settings,
        }

    def notes(self, *, template: bool = True) -> tuple[str, ...]:
        """Return notes on precision and system prompt; ``template``: the artifact includes a chat template."""
        foreign = (
            ()
            if "config" in self.adapter.lineage
            else ("bfloat16 is assumed: the adapter's lineage does not name the precision of its training",)
        )
        prompt = self.system_prompt
        if prompt.text is not None and template:
            note = f"its chat template adds the trained system prompt if there is no other: {prompt.shown}"
        elif prompt.text is not None:
            note = f"the adapter's file alone has no system prompt: send the trained one: {prompt.text}"
        elif prompt.why_none is not None:
            note = f"no system prompt is written into it: {prompt.why_none}"
        else:
            return foreign
        return (*foreign, note)


RECORD = "export.json"

Kind = Literal["merged", "gguf-lora", "gguf-merged", "ollama", "compressed", "hub"]


class MergeMeasurement(Part):
    """A merge method and its distance from the trained model."""

    way: Literal["original", "dequantized"]
    kl: Annotated[float, Field(description="Mean KL divergence from the trained model, nats.")]


class Export(Part):
    """An artifact's kind, inputs and measurements."""

    schema_version: Literal[1] = 1
    kind: Kind
    made_of: Annotated[dict[str, Any], Field(description="Digests of adapter, base and chat format, and the settings.")]
    lineage: Annotated[dict[str, Any], Field(description="The adapter's own lineage.")]
    ways: Annotated[
        tuple[MergeMeasurement, ...],
        Field(description="Measured merge methods; empty if there is only one."),
    ]
    way: Annotated[str, Field(description="The merge method: the one closest to the trained model.")]
    figures: Annotated[
        Figures | None, Field(description="None if the engine rejected the file, or for an adapter itself.")
    ]
    limits: Limits
    shortcomings: Annotated[tuple[str, ...], Field(description="Why the artifact failed; empty for one that was kept.")]
    notes: Annotated[tuple[str, ...], Field(description="Notes for the user.")]
    files: Annotated[dict[str, str], Field(description="SHA-256 of each file, by name.")]
    packages: dict[str, str]
    created: Annotated[str, Field(description="UTC, ISO 8601.")]

    @property
    def inputs_digest(self) -> str:
        """The SHA-256 of the inputs."""
        return digest(self.made_of)


def read_record(folder: Path) -> Export:
    """Return the record of an exported folder."""
    path = folder / RECORD
    try:
        return Export.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"No {RECORD}: this folder is not an export", where=str(folder)) from None
    except (ValueError, ValidationError) as error:
        raise UserError(f"The record cannot be read: {error}", where=str(path)) from None


@dataclass(frozen=True)
class BuiltArtifact:
    """The files in a folder and their measurements."""

    figures: Figures | None
    """None if the engine rejected the file, or for the trained adapter itself."""
    precision: Precision
    way: str
    ways: tuple[MergeMeasurement, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str | None = None
    """The reason why the engine rejected the file."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions in another environment that made it."""

    @property
    def shortcomings(self) -> tuple[str, ...]:
        """Reasons why the artifact fails; empty if it passes."""
        if self.failure is not None:
            return (self.failure,)
        if self.figures is None:
            return ()
        return tuple(shortcomings(self.figures, LIMITS[self.precision]))


@dataclass(frozen=True)
class ExportResult:
    """An artifact, or the record of a failed artifact."""

    folder: Path | None
    """None if the artifact failed and was removed."""
    record: Export
    numbers: Path
    """The file of the record."""
    made: bool
    """False if the artifact existed already."""

    @property
    def good(self) -> bool:
        """True if the artifact matches the trained model."""
        return not self.record.shortcomings

    def as_dict(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "folder": str(self.folder) if self.folder else None,
            "good": self.good,
            "made": self.made,
            "record": str(self.numbers),
            **self.record.model_dump(mode="json"),
        }


class _ParityError(Exception):
    """Raised to remove the folder of an artifact that failed."""

    def __init__(self, record: Export) -> None:
        super().__init__("the artifact differs from the trained model")
        self.record = record


def find_export(target: Path, made_of: Mapping[str, Any]) -> ExportResult | None:
    """Return the artifact at ``target`` if it was made from the same inputs; None if nothing exists."""
    if not target.exists():
        return None
    elsewhere = "Remove it, or use another folder with --to."
    if not (target / RECORD).exists():
        raise UserError("The folder exists and is not an export", where=str(target), fix=elsewhere)
    record = read_record(target)
    if record.inputs_digest != digest(made_of):
        other = sorted(key for key in made_of if record.made_of.get(key) != made_of[key])
        raise UserError(
            f"The folder has an export of other inputs: {', '.join(other)} differ" + ("s" if len(other) == 1 else ""),
            where=str(target),
            fix=elsewhere,
        )
    changed = [
        name
        for name, sha256 in record.files.items()
        if not (target / name).is_file() or file_digest(target / name) != sha256
    ]
    if changed:
        raise UserError(f"Exported files have changed: {', '.join(changed)}", where=str(target), fix=elsewhere)
    return ExportResult(target, record, target / RECORD, made=False)


def export(
    source: ExportSource, kind: Kind, target: Path, made_of: Mapping[str, Any], build: Callable[[Path], BuiltArtifact]
) -> ExportResult:
    """Return the artifact at ``target``, or make it: ``build`` fills a temporary folder and measures it.

    A folder that passes becomes ``target``. One that fails is removed, and its record stays as ``TARGET.failed.json``.
    """
    existing = find_export(target, made_of)
    if existing is not None:
        return existing
    remove_abandoned(target.parent.glob(f".{target.name}.*/"))  # left by killed exports to the same folder
    failed = target.with_name(f"{target.name}.failed.json")
    try:
        with new_folder(target) as temporary, in_use(temporary):
            built = build(temporary)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            record = Export(
                kind=kind,
                made_of=dict(made_of),
                lineage=source.adapter.lineage,
                ways=built.ways,
                way=built.way,
                figures=built.figures,
                limits=LIMITS[built.precision],
                shortcomings=built.shortcomings,
                notes=built.notes,
                files={path.relative_to(temporary).as_posix(): file_digest(path) for path in files},
                packages={**packages(trained_quantization([source.adapter])), **built.packages},
                created=now(),
            )
            write_json(temporary / RECORD, record.model_dump(mode="json"))
            if record.shortcomings:
                raise _ParityError(record)
    except _ParityError as error:
        write_json(failed, error.record.model_dump(mode="json"))
        return ExportResult(None, error.record, failed, made=True)
    failed.unlink(missing_ok=True)
    return ExportResult(target, record, target / RECORD, made=True)
