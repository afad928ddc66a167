"""The access log: evaluations/access_log.jsonl, an append-only record of every opening of the test set.

Each line holds its own digest and the digest of the line before, so a changed, removed or inserted line is detected.
Truncation is detected through the evidence, which holds the line of its own opening. The file cannot reveal a rewrite
of the whole chain together with all evidence: commit it to git.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, text_lines, write_text, writing
from tunewright.data.versions.members import read_places
from tunewright.evidence.logged_access import EarlierAccess, LoggedAccess
from tunewright.evidence.schema import EVIDENCE_FILE

ACCESS_LOG = "access_log.jsonl"
_RESTORE = "Restore the access log, for example from git: it records how often the test was opened."


class AccessLog:
    """The recorded openings of the test set.

    Args:
        evaluations: the project's folder of evaluations.

    Raises:
        UserError: a line was changed or is missing; the message names the first one.
    """

    def __init__(self, evaluations: Path) -> None:
        self.path = evaluations / ACCESS_LOG
        self.openings = _read(self.path)
        self._require_those_of_the_evidence()

    def open(self, **facts: Any) -> LoggedAccess:
        """Return this evaluation's line: the existing one, or a new one.

        Args:
            facts: fields of `LoggedAccess`, without number, time and digests.
        """
        with _locked(self.path.parent):
            self.openings = _read(self.path)
            known = next((o for o in self.openings if o.evaluation == facts["evaluation"]), None)
            if known is not None:
                return known
            opening = LoggedAccess(
                number=len(self.openings) + 1,
                time=now(),
                previous=self.openings[-1].digest if self.openings else "",
                digest="",
                **facts,
            )
            opening = opening.model_copy(update={"digest": opening.true_digest})
            text = self.path.read_text(encoding="utf-8") if self.openings else ""
            write_text(self.path, f"{text}{canonical_json(opening.model_dump(mode='json'))}\n")
            self.openings.append(opening)
            return opening

    def earlier(self, opening: LoggedAccess, dataset: Path, keys: set[str]) -> tuple[EarlierAccess, ...]:
        """Return the earlier openings that share items with this one.

        Args:
            opening: a line of this log.
            dataset: the project's dataset versions, which determine the items that earlier evaluations opened.
            keys: the pair keys of this opening's items.
        """
        found = []
        for other in self.openings[: opening.number - 1]:
            shared = _shared(other, dataset, keys)
            if shared != 0:
                access = other.model_dump(include=set(EarlierAccess.model_fields))
                found.append(EarlierAccess(**access, shared_items=shared))
        return tuple(found)

    def _require_those_of_the_evidence(self) -> None:
        for file in sorted(self.path.parent.glob(f"[!.]*/{EVIDENCE_FILE}")):
            opened = _opening_in(file)
            if opened is None:
                continue
            there = self.openings[opened["number"] - 1] if opened["number"] <= len(self.openings) else None
            if there is None or there.digest != opened["digest"]:
                what = "was changed" if there else "is missing"
                raise UserError(
                    f"Line {opened['number']} {what}: evaluation {file.parent.name} was opened on it",
                    where=f"{self.path}:{opened['number']}",
                    fix=_RESTORE,
                )


def _read(path: Path) -> list[LoggedAccess]:
    """Return the lines, each checked against its own digest and the line before."""
    openings: list[LoggedAccess] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(text_lines(text), start=1):
        where = f"{path}:{number}"
        try:
            opening = LoggedAccess.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            what = f"Not a line of the access log: {'.'.join(map(str, first['loc']))} {first['msg']}"
            raise UserError(what, where=where, fix=_RESTORE) from None
        if opening.true_digest != opening.digest:
            raise UserError(f"Line {number} was changed after it was written", where=where, fix=_RESTORE)
        if (opening.number, opening.previous) != (number, openings[-1].digest if openings else ""):
            raise UserError(
                f"Line {number} does not follow the line before it: a line was changed, removed or inserted",
                where=where,
                fix=_RESTORE,
            )
        openings.append(opening)
    return openings


def _opening_in(file: Path) -> dict[str, Any] | None:
    """Return the opening that an evidence file records, or None. Evidence of any schema is read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("opening")
    except (ValueError, AttributeError):
        return None  # no evidence at all: loading it as evidence reports the error
    return found if isinstance(found, dict) and {"number", "digest"} <= found.keys() else None


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


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the access log for one writer, waiting for any other; the lock dies with its process."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
