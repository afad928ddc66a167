"""Preference pairs of known rows, from files and from judged answers: dataset/preferences.jsonl, one pair a line.

Rejected answers of new rows are in the metadata of their version. A pair belongs to its input, whatever ideal output a
later version gives it. The split of that input in the current version decides if the pair may be trained on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tunewright.core.io import canonical_json, write_text
from tunewright.core.log import SealedLine, numbered_lines

KEPT_PAIRS_FILE = "preferences.jsonl"

JudgedBy = Literal["person", "judge", "file"]
Answer = str | list[dict[str, Any]]
"""The text of an answer, or its turns if it is not one turn of text (`readers.preferences.rejected_value`)."""
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class KeptPair(SealedLine):
    """Two answers to one input, of which one is preferred."""

    spells_none: ClassVar[bool] = True

    key: _Sha256
    """Pair key of the judged row."""
    input: _Sha256
    """:attr:`Example.input_key` of the judged row."""
    chosen: Answer
    rejected: Answer
    kind: JudgedBy
    by: str
    """Name of the reviewer or of the judging model, who saw both answers blind, or FILE:LINE."""
    when: str
    """UTC, ISO 8601."""
    version: _Sha256
    """Digest of the dataset version that was evaluated, or that was current when the file was added."""
    evaluation: str | None = None
    arms: tuple[str, str] | None = None
    """The arms that wrote the chosen and the rejected answer; None of a file's pair."""

    @property
    def said(self) -> tuple[str, str, str]:
        """The input and both answers, comparable."""
        return self.input, canonical_json(self.chosen), canonical_json(self.rejected)


def read_kept_pairs(dataset: Path) -> list[KeptPair]:
    """Return the kept pairs of a dataset, in the order of the file.

    Raises:
        UserError: a line is not a pair, or was changed.
    """
    path = dataset / KEPT_PAIRS_FILE
    if not path.is_file():
        return []
    lines = numbered_lines(path.read_bytes())
    return [KeptPair.parse(line, f"{path}:{number}", "preference pair") for number, line in lines]


def replace_kept_pairs(dataset: Path, evaluation: str, kind: JudgedBy, pairs: Sequence[KeptPair]) -> int:
    """Keep exactly these pairs of one evaluation's people or judge; the caller holds the dataset's lock.

    Returns:
        The number of pairs that were not kept before.
    """
    before = read_kept_pairs(dataset)
    others = [pair for pair in before if (pair.evaluation, pair.kind) != (evaluation, kind)]
    wanted = [*others, *pairs]
    if wanted != before:
        _write(dataset, wanted)
    return sum(pair not in before for pair in pairs)


def add_kept_pairs(dataset: Path, pairs: Sequence[KeptPair]) -> int:
    """Keep the pairs whose answers are not kept yet, and return their number; the caller holds the dataset's lock."""
    before = read_kept_pairs(dataset)
    known = {pair.said for pair in before}
    new = list({pair.said: pair for pair in pairs if pair.said not in known}.values())
    if new:
        _write(dataset, [*before, *new])
    return len(new)


def erase_kept_pairs(dataset: Path, purged: Collection[str]) -> int:
    """Erase the pairs of purged rows, given by pair key; return their number. The caller holds the dataset's lock."""
    before = read_kept_pairs(dataset) if purged else []
    kept = [pair for pair in before if pair.key not in purged]
    if len(kept) < len(before):
        _write(dataset, kept)
    return len(before) - len(kept)


def _write(dataset: Path, pairs: Sequence[KeptPair]) -> None:
    write_text(dataset / KEPT_PAIRS_FILE, "".join(pair.line for pair in pairs))
