"""From a trained adapter to an artefact held to it: written aside, measured, and only then put in its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.adapters.fit import trained_quantize
from tunewright.adapters.registry import Adapter
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import digest, file_digest, new_folder, write_json
from tunewright.export.parity import LIMITS, Figures, Precision, shortcomings
from tunewright.export.record import RECORD, Export, Kind, WayMeasured, read_record
from tunewright.training.lineage import packages


@dataclass(frozen=True)
class Built:
    """What was put into a folder, and what was measured of it there."""

    figures: Figures | None
    """None where the engine did not take the file."""
    precision: Precision
    way: str
    ways: tuple[WayMeasured, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str | None = None
    """Why there are no figures."""

    @property
    def shortcomings(self) -> tuple[str, ...]:
        """Why it is not good; empty where it is."""
        if self.figures is None:
            return (self.failure or "it was not measured",)
        return tuple(shortcomings(self.figures, LIMITS[self.precision]))


@dataclass(frozen=True)
class ExportResult:
    """An artefact, or what is left of one that was not good: its figures."""

    folder: Path | None
    """None of one that was not good, which is gone."""
    record: Export
    numbers: Path
    """Where the record lies."""
    made: bool
    """False where it was there already."""

    @property
    def good(self) -> bool:
        """True if it is as the trained model is."""
        return not self.record.shortcomings

    def as_dict(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        return {
            "folder": str(self.folder) if self.folder else None,
            "good": self.good,
            "made": self.made,
            "record": str(self.numbers),
            **self.record.model_dump(mode="json"),
        }


class _NotGoodError(Exception):
    """Takes a folder that is not good away with it."""

    def __init__(self, record: Export) -> None:
        super().__init__("not good")
        self.record = record


def found_export(target: Path, made_of: Mapping[str, Any]) -> ExportResult | None:
    """Return what lies at ``target`` already, if it was made of the same; None where nothing is there.

    Raises:
        UserError: something else lies there, or a file of it has changed.
    """
    if not target.exists():
        return None
    elsewhere = "Remove it, or name another folder with --to."
    if not (target / RECORD).exists():
        raise UserError("this folder is there already, and nothing that was exported", where=str(target), fix=elsewhere)
    record = read_record(target)
    if record.inputs_digest != digest(made_of):
        other = sorted(key for key in made_of if record.made_of.get(key) != made_of[key])
        raise UserError(
            f"what lies here was exported from something else: {', '.join(other)} differ"
            + ("s" if len(other) == 1 else ""),
            where=str(target),
            fix=elsewhere,
        )
    changed = [name for name, sha256 in record.files.items() if _changed(target / name, sha256)]
    if changed:
        raise UserError(f"no longer what was exported: {', '.join(changed)}", where=str(target), fix=elsewhere)
    return ExportResult(target, record, target / RECORD, made=False)


def export(
    target: Path, kind: Kind, adapter: Adapter, made_of: Mapping[str, Any], build: Callable[[Path], Built]
) -> ExportResult:
    """Have ``build`` fill a folder and measure it there; it becomes ``target`` if it is good.

    One that is not is removed, and its record stays as ``TARGET.failed.json``.
    """
    for cut_off in target.parent.glob(f".{target.name}.*"):  # a process that made this very folder was killed
        shutil.rmtree(cut_off, ignore_errors=True)
    failed = target.with_name(f"{target.name}.failed.json")
    try:
        with new_folder(target) as temporary:
            record = _record(kind, adapter, made_of, build(temporary), temporary)
            write_json(temporary / RECORD, record.model_dump(mode="json"))
            if record.shortcomings:
                raise _NotGoodError(record)
    except _NotGoodError as error:
        write_json(failed, error.record.model_dump(mode="json"))
        return ExportResult(None, error.record, failed, made=True)
    failed.unlink(missing_ok=True)
    return ExportResult(target, record, target / RECORD, made=True)


def _record(kind: Kind, adapter: Adapter, made_of: Mapping[str, Any], built: Built, folder: Path) -> Export:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Export(
        kind=kind,
        made_of=dict(made_of),
        lineage=adapter.lineage,
        ways=built.ways,
        way=built.way,
        figures=built.figures,
        limits=LIMITS[built.precision],
        shortcomings=built.shortcomings,
        notes=built.notes,
        files={path.relative_to(folder).as_posix(): file_digest(path) for path in files},
        packages=packages(trained_quantize([adapter])),
        created=now(),
    )


def _changed(path: Path, sha256: str) -> bool:
    return not path.is_file() or file_digest(path) != sha256
