"""Export of a trained adapter: the artifact is built in a temporary folder, measured, and kept only if it passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunewright.adapters.compatibility import trained_quantization
from tunewright.adapters.lineage import packages
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import digest, file_digest, new_folder, write_json
from tunewright.core.locks import in_use, remove_abandoned
from tunewright.export.record import RECORD, Export, Kind, MergeMeasurement, read_record
from tunewright.export.source import Source
from tunewright.gate.parity import LIMITS, Figures, Precision, shortcomings


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
    """An artifact, or the record of one that failed."""

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
    """Return the artifact at ``target`` if it was made from the same inputs; None if nothing is there.

    Raises:
        UserError: something else is there, or one of its files has changed.
    """
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
    changed = [name for name, sha256 in record.files.items() if _changed(target / name, sha256)]
    if changed:
        raise UserError(f"Exported files have changed: {', '.join(changed)}", where=str(target), fix=elsewhere)
    return ExportResult(target, record, target / RECORD, made=False)


def export(
    source: Source, kind: Kind, target: Path, made_of: Mapping[str, Any], build: Callable[[Path], BuiltArtifact]
) -> ExportResult:
    """Return the artifact at ``target``, or make it: ``build`` fills a temporary folder and measures it.

    A folder that passes becomes ``target``. One that fails is removed, and its record stays as ``TARGET.failed.json``.

    Args:
        source: the exported adapter.
        kind: the kind of artifact in its record.
        target: the folder of the artifact.
        made_of: the inputs that determine it.
        build: writes the files and compares them with the trained model.

    Raises:
        UserError: the folder has other contents.
    """
    existing = find_export(target, made_of)
    if existing is not None:
        return existing
    remove_abandoned(target.parent.glob(f".{target.name}.*/"))  # of killed exports to the same folder
    failed = target.with_name(f"{target.name}.failed.json")
    try:
        with new_folder(target) as temporary, in_use(temporary):
            record = _record(source, kind, made_of, build(temporary), temporary)
            write_json(temporary / RECORD, record.model_dump(mode="json"))
            if record.shortcomings:
                raise _ParityError(record)
    except _ParityError as error:
        write_json(failed, error.record.model_dump(mode="json"))
        return ExportResult(None, error.record, failed, made=True)
    failed.unlink(missing_ok=True)
    return ExportResult(target, record, target / RECORD, made=True)


def _record(source: Source, kind: Kind, made_of: Mapping[str, Any], built: BuiltArtifact, folder: Path) -> Export:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Export(
        kind=kind,
        made_of=dict(made_of),
        lineage=source.adapter.lineage,
        ways=built.ways,
        way=built.way,
        figures=built.figures,
        limits=LIMITS[built.precision],
        shortcomings=built.shortcomings,
        notes=built.notes,
        files={path.relative_to(folder).as_posix(): file_digest(path) for path in files},
        packages={**packages(trained_quantization([source.adapter])), **built.packages},
        created=now(),
    )


def _changed(path: Path, sha256: str) -> bool:
    return not path.is_file() or file_digest(path) != sha256
