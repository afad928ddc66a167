"""The access log: evaluations/access_log.jsonl, an append-only record of openings of the test set and of its results.

Each line holds its own digest and the digest of the line before, so a changed, removed or inserted line is detected.
Truncation is detected through the evidence, which holds the line of its own opening. A line also binds each file of
measurements by digest when it is written or amended, so a file that was edited later is detected. A copy in the folder
of the dataset reveals that the log was deleted, and restores it. The log cannot reveal a rewrite of the whole chain
together with all files and the copy: commit it to git.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, file_digest, json_document, text_lines, write_text, writing
from tunewright.core.locks import locked_folder
from tunewright.core.log import parse_line
from tunewright.core.numbers import give_number
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of
from tunewright.data.versions.files import read_places
from tunewright.data.versions.version import current_author
from tunewright.evidence.common import Part
from tunewright.evidence.files import EVIDENCE_FILE, load_evidence
from tunewright.evidence.logged_access import EarlierAccess, LoggedAccess, WrittenFiles
from tunewright.evidence.schema import Evidence

ACCESS_LOG = "access_log.jsonl"
_RESTORE = "Restore the access log, for example from git: it records how often the test was opened."
_STAGED = ".staged"
_LOCK_S = 10.0
"""Timeout of a writer that waits for others, each of which takes far less unless it is stopped."""
_Line = LoggedAccess | WrittenFiles
_LINE: TypeAdapter[_Line] = TypeAdapter(Annotated[_Line, Field(discriminator="event")])


class AccessLog:
    """The recorded openings of the test set, and the digests of the files that hold its results.

    Files are named by their paths relative to the folder of evaluations. A write that a crash
    interrupted is completed first, so that the files exist when they are read.
    """

    def __init__(self, evaluations: Path) -> None:
        self.path = evaluations / ACCESS_LOG
        self._copy = evaluations.parent / "dataset" / ACCESS_LOG
        self._lines: list[_Line] = []
        if evaluations.exists():
            with self._held():
                self._require_those_of_the_evidence()
                self._require_those_of_the_copy()
        else:
            self._require_those_of_the_copy()

    @property
    def openings(self) -> list[LoggedAccess]:
        """The openings of the test set, oldest first."""
        return [line for line in self._lines if isinstance(line, LoggedAccess)]

    def open(self, **facts: Any) -> LoggedAccess:
        """Return this evaluation's line: the existing one, or a new one."""
        with self._held():
            known = next((o for o in self.openings if o.evaluation == facts["evaluation"]), None)
            if known is not None:
                return known
            opening = LoggedAccess(**self._next(), **facts)
            opening = opening.model_copy(update={"digest": opening.true_digest})
            self._append(opening)
            return opening

    def earlier(self, opening: LoggedAccess, dataset: Path, keys: set[str]) -> tuple[EarlierAccess, ...]:
        """Return the earlier openings that share items with this one."""
        found = []
        for other in self.openings:
            if other.number >= opening.number:
                break
            shared = _shared(other, dataset, keys)
            if shared != 0:
                access = other.model_dump(include=set(EarlierAccess.model_fields))
                found.append(EarlierAccess(**access, shared_items=shared))
        return tuple(found)

    def write(self, file: Path, text: str) -> None:
        """Write a file together with a line that binds it."""
        with self._held():
            self._write({file: text})

    def add(self, folder: Path, files: Mapping[str, str]) -> None:
        """Write a new evaluation and give it a number; an existing one is kept, since its inputs name the folder."""
        with self._held():
            if not (folder / EVIDENCE_FILE).exists():
                self._write({folder / name: text for name, text in files.items()})
            give_number(folder.parent, folder.name)

    def amend(
        self, folder: Path, files: Mapping[str, str] | None = None, **sections: Part | Mapping[str, Part]
    ) -> Evidence:
        """Add later measurements to an evaluation's evidence, and files by name and text next to it."""
        with self._held():
            self._require_evaluation(folder)
            evidence = load_evidence(folder).model_copy(update=sections)
            texts = {**(files or {}), EVIDENCE_FILE: json_document(evidence.model_dump(mode="json"))}
            self._write({folder / name: text for name, text in texts.items()})
            return evidence

    def load(self, folder: Path) -> Evidence:
        """Load an evaluation's evidence, after checking all its files."""
        with self._held():
            self._require_evaluation(folder)
            return load_evidence(folder)

    def require(self, *files: Path) -> None:
        """Refuse files that differ from their newest lines."""
        if not files:
            return  # no log has to exist
        with self._held():
            for file in files:
                self._require(os.path.relpath(file, self.path.parent))

    def require_all(self) -> None:
        """Refuse a project in which a file of any evaluation differs from its line."""
        if not self.path.parent.exists():
            return
        with self._held():
            for file in sorted(self.path.parent.glob(f"[!.]*/{EVIDENCE_FILE}")):
                self._require_evaluation(file.parent)

    def removed_since(self, time: str, adapter: str | None = None) -> list[str]:
        """Return the evaluations of an adapter, or all, that were written after a time and whose evidence is gone."""
        of_adapter = {o.evaluation for o in self.openings if o.adapter_digest == adapter}
        removed = []
        for name, line in self._newest().items():
            folder, _, file = name.rpartition("/")
            if file == EVIDENCE_FILE and (adapter is None or folder in of_adapter) and line.time > time:
                removed += [] if (self.path.parent / name).exists() else [folder]
        return removed

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the lock, which ends with its process; lines are read again, and an interrupted write is completed."""
        busy = UserError(
            f"Another command has been writing the access log for {_LOCK_S:g} s",
            where=str(self.path.parent),
            fix="Continue it (fg) or end it, and run the same command again.",
        )
        with locked_folder(self.path.parent, busy, _LOCK_S):
            self._lines = _read(self.path)
            with writing(self.path):
                self._complete()
            yield

    def _next(self) -> dict[str, Any]:
        """Return the fields that each new line has."""
        previous = self._lines[-1].digest if self._lines else ""
        return {"number": len(self._lines) + 1, "time": now(), "previous": previous, "digest": ""}

    def _append(self, line: _Line) -> None:
        text = self.path.read_text(encoding="utf-8") if self._lines else ""
        text = f"{text}{canonical_json(line.model_dump(mode='json'))}\n"
        write_text(self.path, text)
        self._lines.append(line)
        if self._copy.parent.is_dir():  # last, so that it is never ahead of the log
            write_text(self._copy, text)

    def _write(self, files: Mapping[Path, str]) -> None:
        # The line commits the write. A crash before it leaves staged files without a line, which are discarded; one
        # after it leaves staged files that match their line, which the next command puts in place.
        for file, text in files.items():
            write_text(_staged(file), text)
        digests = {
            os.path.relpath(file, self.path.parent): hashlib.sha256(text.encode()).hexdigest()
            for file, text in files.items()
        }
        line = WrittenFiles(**self._next(), author=current_author(self.path.parent), files=digests)
        self._append(line.model_copy(update={"digest": line.true_digest}))
        for file in files:
            _staged(file).replace(file)

    def _complete(self) -> None:
        """Put staged files in place if their line was written, and discard other staged files."""
        newest = {self.path.parent / name: line.files[name] for name, line in self._newest().items()}
        folders = {self.path.parent, *(file.parent for file in newest), *self.path.parent.glob("[!.]*/")}
        for staged in [file for folder in folders for file in folder.glob(f".*{_STAGED}*")]:  # also half-written ones
            target = staged.with_name(staged.name.removeprefix(".").removesuffix(_STAGED))
            if newest.get(target) == file_digest(staged):
                staged.replace(target)
                continue
            staged.unlink()
            if target.parent.parent == self.path.parent and not any(target.parent.iterdir()):
                target.parent.rmdir()  # a new evaluation that was not written

    def _newest(self) -> dict[str, WrittenFiles]:
        """Return each file's newest line."""
        return {name: line for line in self._lines if isinstance(line, WrittenFiles) for name in line.files}

    def _require_evaluation(self, folder: Path) -> None:
        if not (folder / EVIDENCE_FILE).exists():
            return  # loading it reports the error
        place = os.path.relpath(folder, self.path.parent)
        self._require(f"{place}/{EVIDENCE_FILE}")
        for name in self._newest():
            if name.startswith(f"{place}/") and (self.path.parent / name).exists():
                self._require(name)

    def _require(self, name: str) -> None:
        file, line = self.path.parent / name, self._newest().get(name)
        measured = file.parent if file.parent.parent == self.path.parent else file
        again = (
            f"Restore it, for example from git. Or remove {measured} and measure again: existing answers are reused."
        )
        if line is None:
            raise UserError(f"{file.name} has no line in {self.path}", where=str(file), fix=again)
        found = file_digest(file)
        if found != line.files[name]:
            raise UserError(
                f"{file.name} was changed after it was written: its SHA-256 is {found[:12]}…, and "
                f"{line.files[name][:12]}… in line {line.number} of {self.path}",
                where=str(file),
                fix=again,
            )

    def _require_those_of_the_copy(self) -> None:
        """Refuse a log without lines of its copy: it was deleted with all evidence, or is an earlier one."""
        copied = _read(self._copy)
        there = [line.digest for line in self._lines]
        opened = sum(isinstance(line, LoggedAccess) for line in copied)
        if not opened or there[: len(copied)] == [line.digest for line in copied]:
            return
        number = next((n for n, line in enumerate(copied) if line.digest not in there[n : n + 1]), 0) + 1
        lost = f"Line {number} of the access log is not the one of its copy" if there else "The access log is missing"
        again = f"mkdir -p {self.path.parent} && cp {self._copy} {self.path}"
        raise UserError(
            f"{lost}: {self._copy} has {count_of(opened, 'opening')} of the test split",
            where=str(self.path),
            fix=f"Restore {self.path.parent} from git, or the log from its copy: {again}",
        )

    def _require_those_of_the_evidence(self) -> None:
        for file in sorted(self.path.parent.glob(f"[!.]*/{EVIDENCE_FILE}")):
            try:
                opened = json.loads(file.read_text(encoding="utf-8")).get("opening")  # of any schema
            except (ValueError, AttributeError):
                continue  # no evidence at all: loading it as evidence reports the error
            if not isinstance(opened, dict) or not {"number", "digest"} <= opened.keys():
                continue
            there = self._lines[opened["number"] - 1] if opened["number"] <= len(self._lines) else None
            if there is None or there.digest != opened["digest"]:
                what = "was changed" if there else "is missing"
                raise UserError(
                    f"Line {opened['number']} {what}: evaluation {file.parent.name} was opened on it",
                    where=f"{self.path}:{opened['number']}",
                    fix=_RESTORE,
                )


def log_of(place: Path, evaluations: Path) -> AccessLog | None:
    """Return the access log that binds an evaluation's files, or None for evidence outside of any project.

    The evaluations of a project need its log. An evaluation elsewhere needs the log of the folder that it lies in, if
    that folder has one: it belongs to another project.
    """
    folder = _folder(place)
    # Absolute paths too: a link in the folder of evaluations does not lead out of the project.
    if evaluations.absolute() in folder.parents or evaluations.resolve() in folder.resolve().parents:
        return AccessLog(evaluations)
    return AccessLog(folder.parent) if (folder.parent / ACCESS_LOG).exists() else None


def amendable(place: Path, evaluations: Path) -> tuple[AccessLog, Path]:
    """Return the access log of an evaluation that gets more measurements, and its folder as the log names it."""
    log = log_of(place, evaluations)
    if log is None:
        raise UserError(
            "The evaluation is outside of a project, so no access log can record what is added to it",
            where=str(place),
            fix="Run the command in its project.",
        )
    return log, log.path.parent / _folder(place).name


def load_checked(place: Path, evaluations: Path, reporter: Reporter) -> Evidence:
    """Load evidence, checked against its access log; evidence without a log gets a warning."""
    log = log_of(place, evaluations)
    if log is None:
        evidence = load_evidence(place)
        reporter.warn(f"{place} is outside of a project's evaluations: no access log shows that it was not changed.")
        return evidence
    if not place.is_dir() and place.name != EVIDENCE_FILE:
        log.require(log.path.parent / _folder(place).name / place.name)
    return log.load(log.path.parent / _folder(place).name)


def _folder(place: Path) -> Path:
    """Return the absolute path of an evaluation's folder, which may be given as its evidence file."""
    return Path(os.path.normpath((place if place.is_dir() else place.parent).absolute()))


def _staged(file: Path) -> Path:
    return file.with_name(f".{file.name}{_STAGED}")


def _read(path: Path) -> list[_Line]:
    """Return the lines, each checked against its own digest and the line before."""
    lines: list[_Line] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, text_line in enumerate(text_lines(text), start=1):
        where = f"{path}:{number}"
        line = parse_line(_LINE.validate_json, text_line.encode(), where, "Not a line of the access log", _RESTORE)
        if line.true_digest != line.digest:
            raise UserError(f"Line {number} was changed after it was written", where=where, fix=_RESTORE)
        if (line.number, line.previous) != (number, lines[-1].digest if lines else ""):
            raise UserError(
                f"Line {number} does not follow the line before it: a line was changed, removed or inserted",
                where=where,
                fix=_RESTORE,
            )
        lines.append(line)
    return lines


def _shared(other: LoggedAccess, dataset: Path, keys: set[str]) -> int | None:
    """Return the number of these items that an earlier evaluation opened, or None without its dataset version."""
    try:
        places = read_places(dataset, other.dataset)
    except UserError:
        return None
    return sum(
        (place.split == "test" or other.design == "cross-fitted") and not place.mixed
        for key, place in places.items()
        if key in keys
    )
