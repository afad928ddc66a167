"""Secrets and personal data in rows that are added: refused, told, let through or replaced."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.core.progress import Reporter
from tunewright.data import pii
from tunewright.data.notices import listed
from tunewright.data.pii.findings import Finder, Finding
from tunewright.data.pii.names import open_presidio
from tunewright.data.readers import SourceRow
from tunewright.data.readers.metadata import texts_of

_MOST = 10


@dataclass(frozen=True)
class Screened:
    """The rows, with placeholders where ``redacted`` counts them by kind; ``personal`` counts what was left in."""

    rows: list[SourceRow]
    redacted: dict[str, int]
    personal: dict[str, int]


def screen(
    rows: list[SourceRow], allow: Sequence[str], reporter: Reporter, *, redact: bool, presidio: str | None
) -> Screened:
    """Look for secrets and personal data.

    Args:
        allow: kinds that are let through, and told.
        redact: put placeholders for them.
        presidio: a spaCy model to look for names and places with too.

    Raises:
        UserError: a secret that is neither replaced nor let through, by place; or presidio or its model is missing.
    """
    also = open_presidio(presidio) if presidio else None
    redacted: Counter[str] = Counter()
    if redact:
        rows, redacted = _redacted(rows, also, allow, reporter)
    rows = _with_clean_values(rows, also, allow, reporter, redact=redact)
    placed = [(f"{row.source}:{row.line}", row.example) for row in rows]
    found = pii.scan(placed, reporter, also=also, allow=allow)
    if told := pii.let_through(found):
        reporter.say(told)
    if found.of("secret"):
        raise pii.blocked(found)
    if found.of("personal"):
        reporter.warn(pii.warned(found))
    return Screened(rows, dict(redacted), dict(found.counts))


def _redacted(
    rows: Sequence[SourceRow], also: Finder | None, allow: Sequence[str], reporter: Reporter
) -> tuple[list[SourceRow], Counter[str]]:
    done: list[SourceRow] = []
    counts: Counter[str] = Counter()
    with reporter.task("redacting", len(rows), "rows") as task:
        for row in rows:
            example, of_row = pii.redact(row.example, also=also, allow=allow)
            counts.update(of_row)
            done.append(replace(row, example=example))
            task.advance()
    if counts:
        told = ", ".join(f"{count:,} {pii.LABELS[kind]}" for kind, count in sorted(counts.items()))
        reporter.say(f"Placeholders put for {told}")
    return done, counts


def _with_clean_values(
    rows: list[SourceRow], also: Finder | None, allow: Sequence[str], reporter: Reporter, *, redact: bool
) -> list[SourceRow]:
    """The rows with no secret as a value of a group or of metadata, for these are kept with the version as they are.

    A text is replaced as a whole, by a digest of it, so that rows of one group still share it.

    Raises:
        UserError: a value holds a secret, and is not to be replaced.
    """
    found: dict[tuple[str, str], list[Finding]] = {}
    told: dict[str, list[str]] = {"secret": [], "personal": []}

    def looked_at(name: str, text: str, row: SourceRow, where: str) -> bool:
        if (name, text) not in found:
            found[name, text] = [f for f in pii.find_in_value(name, text, also) if f.kind not in allow]
        for finding in found[name, text]:
            told[finding.category].append(f"{row.source}:{row.line}: {pii.LABELS[finding.kind]} in {where}")
        return bool(found[name, text])

    clean = []
    for row in rows:
        bad_groups = [name for name, value in row.groups.items() if looked_at(name, value, row, f"the group {name}")]
        # A key that holds a secret itself is not named: the message would spread it.
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
            reporter.say(f"Digests put for {values:,} values of groups and metadata")
        return clean
    if told["secret"]:
        raise UserError(
            f"{len(told['secret']):,} secrets as values of groups or metadata, nothing was added\n"
            f"{_places(told['secret'])}",
            fix="Name the key in data.drop_columns (a group: group by something else), or add the rows with --redact, "
            "which puts a digest in the value's place.",
        )
    if told["personal"]:
        reporter.warn(
            "personal data as values of groups or metadata, which are kept with the version as they are; --redact puts "
            f"digests in their place, data.drop_columns leaves a key out.\n{_places(told['personal'])}"
        )
    return clean


def _digested(value: str) -> str:
    return f"redacted-{hashlib.sha256(value.encode()).hexdigest()[:16]}"


def _places(told: Sequence[str]) -> str:
    return listed(told, len(told), _MOST, "--redact replaces all of them")
