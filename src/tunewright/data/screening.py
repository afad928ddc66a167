"""Secrets and personal data in added rows: refused, reported, allowed or replaced."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.core.progress import Reporter, Task
from tunewright.core.text import listed
from tunewright.core.workers import THIS_PROCESS, Workers, slices
from tunewright.data import pii
from tunewright.data.examples import Example, RowFile
from tunewright.data.pii import LocatedFinding
from tunewright.data.pii.personal import open_presidio
from tunewright.data.pii.secret_patterns import Finder, Finding
from tunewright.data.readers import SourceRow
from tunewright.data.readers.validate import REJECTED, rejected_messages, rejected_value

_MOST = 10


@dataclass(frozen=True)
class ScreenedRows:
    """Rows after screening. ``redacted`` counts placeholders by kind, ``personal`` the findings left in."""

    rows: list[SourceRow]
    redacted: dict[str, int]
    personal: dict[str, int]
    reasoning: int
    """Rows with thinking in a turn."""


def screen(
    rows: list[SourceRow],
    allow: Sequence[str],
    reporter: Reporter,
    *,
    redact: bool,
    presidio: str | None,
    workers: Workers = THIS_PROCESS,
) -> ScreenedRows:
    """Search rows for secrets and personal data, and replace them by placeholders with ``redact``.

    Secrets that are neither replaced nor allowed are refused, by place. Kinds in ``allow`` are
    permitted, and reported. ``presidio`` is a spaCy model that also finds names and places.
    """
    screening = _Screening(tuple(allow), redact, presidio)
    if presidio:
        _finder(presidio)  # refuse before any row is read
    with reporter.task("looking for secrets", len(rows), "examples") as task:
        parts, file = list[_Part](), RowFile()
        for part in workers.map(_screen_rows, screening, slices(rows, pii.STEP), task, batch=2):
            parts.append(replace(part, rows=[row.stored(file) for row in part.rows]))
    if redact:
        rows = [row for part in parts for row in part.rows]
    redacted: Counter[str] = Counter()
    for part in parts:
        redacted.update(part.redacted)
    if redacted:
        kinds = ", ".join(f"{count:,} {pii.LABELS[kind]}" for kind, count in sorted(redacted.items()))
        reporter.say(f"Replaced by placeholders: {kinds}")
    _report_values(parts, reporter, redact=redact)
    found = pii.Scan(len(rows), tuple(place for part in parts for place in part.found), frozenset(allow))
    if allowed := pii.allowed_note(found):
        reporter.say(allowed)
    if found.of("secret"):
        raise pii.blocked(found)
    if found.of("personal"):
        reporter.warn(pii.warned(found))
    return ScreenedRows(rows, dict(redacted), dict(found.counts), sum(part.reasoning for part in parts))


@dataclass(frozen=True)
class _Screening:
    """Options of :func:`screen`."""

    allow: tuple[str, ...]
    redact: bool
    presidio: str | None


@dataclass
class _Part:
    """Findings in turns of some rows; with ``redact`` the rows without them."""

    rows: list[SourceRow] = field(default_factory=list)
    redacted: Counter[str] = field(default_factory=Counter)
    found: list[LocatedFinding] = field(default_factory=list)
    reasoning: int = 0
    # Findings in values of groups and metadata: the texts, and places for messages by category.
    texts: set[str] = field(default_factory=set)
    secret: list[str] = field(default_factory=list)
    personal: list[str] = field(default_factory=list)


_finder = cache(open_presidio)
"""Return a model's finder, loaded once in each process."""


def _screen_rows(screening: _Screening, rows: Sequence[SourceRow], task: Task) -> _Part:
    """Search some rows, and replace the findings if requested."""
    also = _finder(screening.presidio) if screening.presidio else None
    part = _Part(reasoning=sum(row.example.has_reasoning for row in rows))
    if screening.redact:
        rows = [_redact_row(row, also, screening.allow, part.redacted) for row in rows]
    clean = _clean_values(rows, also, screening, part)
    part.found = pii.find_in_rows([(f"{row.source}:{row.line}", row.example) for row in clean], also)
    if screening.redact:
        part.rows = clean
    task.advance(len(rows))
    return part


def _redact_row(row: SourceRow, also: Finder | None, allow: Sequence[str], counts: Counter[str]) -> SourceRow:
    example, of_row = pii.redact(row.example, also=also, allow=allow)
    counts.update(of_row)
    metadata = row.metadata
    if REJECTED in metadata and isinstance(metadata[REJECTED], str | list):
        answer = rejected_messages(metadata[REJECTED])
        # With the prompt, so that the rejected answer gets the same placeholders.
        redacted, _ = pii.redact(Example((*row.example.prompt, *answer)), also=also, allow=allow)
        metadata = {**metadata, REJECTED: rejected_value(redacted.messages[-len(answer) :])}
    return replace(row, example=example, metadata=metadata)


def _clean_values(
    rows: Sequence[SourceRow], also: Finder | None, screening: _Screening, part: _Part
) -> list[SourceRow]:
    """Return the rows, with ``redact`` without secrets in group values and metadata, which the version stores as given.

    A text is replaced as a whole by its digest, so that rows of one group still share a value. ``part`` receives the
    findings.
    """
    found: dict[tuple[str, str], list[Finding]] = {}

    def looked_at(name: str, text: str, row: SourceRow, where: str) -> bool:
        if (name, text) not in found:
            found[name, text] = [f for f in pii.find_in_value(name, text, also) if f.kind not in screening.allow]
        for finding in found[name, text]:
            places = part.secret if finding.category == "secret" else part.personal
            places.append(f"{row.source}:{row.line}: {pii.LABELS[finding.kind]} in {where}")
            part.texts.add(text)
        return bool(found[name, text])

    clean = []
    for row in rows:
        bad_groups = [name for name, value in row.groups.items() if looked_at(name, value, row, f"the group {name}")]
        # A key that contains a secret is not named: the message would leak it.
        bad_names = {key: _digest_text(key) for key in row.metadata if looked_at("", key, row, "a key's name")}
        texts = [(key, *each) for key, value in row.metadata.items() for each in pii.value_texts(value, key)]
        bad_keys = {
            key for key, name, text in texts if looked_at(name, text, row, f"the key {bad_names.get(key, key)}")
        }
        if screening.redact and (bad_groups or bad_keys or bad_names):
            groups = {**row.groups, **{name: _digest_text(row.groups[name]) for name in bad_groups}}
            metadata = {
                bad_names.get(key, key): _digest_text(canonical_json(value)) if key in bad_keys else value
                for key, value in row.metadata.items()
            }
            row = replace(row, groups=groups, metadata=metadata)
        clean.append(row)
    return clean


def _report_values(parts: Sequence[_Part], reporter: Reporter, *, redact: bool) -> None:
    """Report the findings in group values and metadata."""
    if redact:
        replaced = len(set().union(*(part.texts for part in parts)))
        if replaced:
            reporter.say(f"Replaced by digests: {replaced:,} values of groups and metadata")
        return
    secret = [place for part in parts for place in part.secret]
    personal = [place for part in parts for place in part.personal]
    if secret:
        raise UserError(
            f"{len(secret):,} secrets in groups or metadata, nothing was added\n{_places(secret)}",
            fix="Name the key in data.drop_columns (for a group, use another key), or use --redact, which replaces "
            "values by digests.",
        )
    if personal:
        reporter.warn(
            "personal data in groups or metadata, which the version stores unchanged. --redact replaces values by "
            f"digests; data.drop_columns drops a key.\n{_places(personal)}"
        )


def _digest_text(value: str) -> str:
    return f"redacted-{hashlib.sha256(value.encode()).hexdigest()[:16]}"


def _places(lines: Sequence[str]) -> str:
    return listed(lines, len(lines), _MOST, "--redact replaces all of them")
