"""Secrets and personal data in added rows: refused, reported, allowed or replaced."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.core.progress import Reporter
from tunewright.core.text import listed
from tunewright.data import pii
from tunewright.data.examples import Example
from tunewright.data.pii.names import open_presidio
from tunewright.data.pii.secret_patterns import Finder, Finding
from tunewright.data.readers import SourceRow
from tunewright.data.readers.preferences import REJECTED, rejected_messages, rejected_value
from tunewright.data.readers.validate import texts_of

_MOST = 10


@dataclass(frozen=True)
class ScreenedRows:
    """Rows after screening. ``redacted`` counts placeholders by kind, ``personal`` the findings left in."""

    rows: list[SourceRow]
    redacted: dict[str, int]
    personal: dict[str, int]


def screen(
    rows: list[SourceRow], allow: Sequence[str], reporter: Reporter, *, redact: bool, presidio: str | None
) -> ScreenedRows:
    """Search rows for secrets and personal data.

    Args:
        allow: kinds that are permitted, and reported.
        redact: replace findings by placeholders.
        presidio: a spaCy model that finds names and places too.

    Raises:
        UserError: a secret that is neither replaced nor allowed, by place; or presidio or its model is missing.
    """
    also = open_presidio(presidio) if presidio else None
    redacted: Counter[str] = Counter()
    if redact:
        rows, redacted = _redacted(rows, also, allow, reporter)
    rows = _with_clean_values(rows, also, allow, reporter, redact=redact)
    placed = [(f"{row.source}:{row.line}", row.example) for row in rows]
    found = pii.scan(placed, reporter, also=also, allow=allow)
    if allowed := pii.allowed_note(found):
        reporter.say(allowed)
    if found.of("secret"):
        raise pii.blocked(found)
    if found.of("personal"):
        reporter.warn(pii.warned(found))
    return ScreenedRows(rows, dict(redacted), dict(found.counts))


def _redacted(
    rows: Sequence[SourceRow], also: Finder | None, allow: Sequence[str], reporter: Reporter
) -> tuple[list[SourceRow], Counter[str]]:
    done: list[SourceRow] = []
    counts: Counter[str] = Counter()
    with reporter.task("redacting", len(rows), "rows") as task:
        for row in rows:
            example, of_row = pii.redact(row.example, also=also, allow=allow)
            counts.update(of_row)
            metadata = row.metadata
            if REJECTED in metadata and isinstance(metadata[REJECTED], str | list):
                metadata = {**metadata, REJECTED: _redacted_answer(row.example, metadata[REJECTED], also, allow)}
            done.append(replace(row, example=example, metadata=metadata))
            task.advance()
    if counts:
        kinds = ", ".join(f"{count:,} {pii.LABELS[kind]}" for kind, count in sorted(counts.items()))
        reporter.say(f"Replaced by placeholders: {kinds}")
    return done, counts


def _redacted_answer(example: Example, rejected: Any, also: Finder | None, allow: Sequence[str]) -> Any:
    """Return a rejected answer with the placeholders of the row's prompt."""
    answer = rejected_messages(rejected)
    redacted, _ = pii.redact(Example((*example.prompt, *answer)), also=also, allow=allow)
    return rejected_value(redacted.messages[-len(answer) :])


def _with_clean_values(
    rows: list[SourceRow], also: Finder | None, allow: Sequence[str], reporter: Reporter, *, redact: bool
) -> list[SourceRow]:
    """Return the rows without secrets in group values and metadata, which the version stores unchanged.

    A text is replaced as a whole by its digest, so that rows of one group still share a value.

    Raises:
        UserError: a value contains a secret, and ``redact`` is not set.
    """
    found: dict[tuple[str, str], list[Finding]] = {}
    places: dict[str, list[str]] = {"secret": [], "personal": []}

    def looked_at(name: str, text: str, row: SourceRow, where: str) -> bool:
        if (name, text) not in found:
            found[name, text] = [f for f in pii.find_in_value(name, text, also) if f.kind not in allow]
        for finding in found[name, text]:
            places[finding.category].append(f"{row.source}:{row.line}: {pii.LABELS[finding.kind]} in {where}")
        return bool(found[name, text])

    clean = []
    for row in rows:
        bad_groups = [name for name, value in row.groups.items() if looked_at(name, value, row, f"the group {name}")]
        # A key that contains a secret is not named: the message would leak it.
        bad_names = {key: _digested(key) for key in row.metadata if looked_at("", key, row, "a key's name")}
        texts = [(key, *each) for key, value in row.metadata.items() for each in texts_of(value, key)]
        bad_keys = {
            key for key, name, text in texts if looked_at(name, text, row, f"the key {bad_names.get(key, key)}")
        }
        if redact and (bad_groups or bad_keys or bad_names):
            groups = {**row.groups, **{name: _digested(row.groups[name]) for name in bad_groups}}
            metadata = {
                bad_names.get(key, key): _digested(canonical_json(value)) if key in bad_keys else value
                for key, value in row.metadata.items()
            }
            row = replace(row, groups=groups, metadata=metadata)
        clean.append(row)
    if redact:
        values = len({text for (_, text), findings in found.items() if findings})
        if values:
            reporter.say(f"Replaced by digests: {values:,} values of groups and metadata")
        return clean
    if places["secret"]:
        raise UserError(
            f"{len(places['secret']):,} secrets in groups or metadata, nothing was added\n{_places(places['secret'])}",
            fix="Name the key in data.drop_columns (for a group, use another key), or use --redact, which replaces "
            "values by digests.",
        )
    if places["personal"]:
        reporter.warn(
            "personal data in groups or metadata, which the version stores unchanged. --redact replaces values by "
            f"digests; data.drop_columns drops a key.\n{_places(places['personal'])}"
        )
    return clean


def _digested(value: str) -> str:
    return f"redacted-{hashlib.sha256(value.encode()).hexdigest()[:16]}"


def _places(lines: Sequence[str]) -> str:
    return listed(lines, len(lines), _MOST, "--redact replaces all of them")
