"""Secrets and personal data in rows that are added: refused, told, let through or replaced."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunewright.data import secrets
from tunewright.data.formats import SourceRow
from tunewright.data.notices import listed
from tunewright.data.secrets.findings import Finder, Finding
from tunewright.data.secrets.names import open_presidio
from tunewright.errors import UserError
from tunewright.progress import Reporter

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
    rows = _with_clean_groups(rows, also, allow, reporter, redact=redact)
    placed = [(f"{row.source}:{row.line}", row.example) for row in rows]
    found = secrets.scan(placed, reporter, also=also, allow=allow)
    if told := secrets.let_through(found):
        reporter.say(told)
    if found.of("secret"):
        raise secrets.blocked(found)
    if found.of("personal"):
        reporter.warn(secrets.warned(found))
    return Screened(rows, dict(redacted), dict(found.counts))


def _redacted(
    rows: Sequence[SourceRow], also: Finder | None, allow: Sequence[str], reporter: Reporter
) -> tuple[list[SourceRow], Counter[str]]:
    done: list[SourceRow] = []
    counts: Counter[str] = Counter()
    with reporter.task("redacting", len(rows), "rows") as task:
        for row in rows:
            example, of_row = secrets.redact(row.example, also=also, allow=allow)
            counts.update(of_row)
            done.append(replace(row, example=example))
            task.advance()
    if counts:
        told = ", ".join(f"{count:,} {secrets.LABELS[kind]}" for kind, count in sorted(counts.items()))
        reporter.say(f"Placeholders put for {told}")
    return done, counts


def _with_clean_groups(
    rows: list[SourceRow], also: Finder | None, allow: Sequence[str], reporter: Reporter, *, redact: bool
) -> list[SourceRow]:
    """The rows with no secret as a group's value, for these are kept with the version as they are.

    A value is replaced as a whole, by a digest of it, so that rows of one group still share it.

    Raises:
        UserError: a value holds a secret, and is not to be replaced.
    """
    found: dict[str, list[Finding]] = {}
    told: dict[str, list[str]] = {"secret": [], "personal": []}
    clean = []
    for row in rows:
        groups = dict(row.groups)
        for name, value in row.groups.items():
            if value not in found:
                found[value] = [f for f in secrets.find(value, also) if f.kind not in allow]
            for finding in found[value]:
                place = f"{row.source}:{row.line}: {secrets.LABELS[finding.kind]} in the group {name}"
                told[finding.category].append(place)
            if found[value] and redact:
                groups[name] = f"redacted-{hashlib.sha256(value.encode()).hexdigest()[:16]}"
        clean.append(replace(row, groups=groups))
    if redact:
        values = sum(bool(findings) for findings in found.values())
        if values:
            reporter.say(f"Digests put for {values:,} values of groups")
        return clean
    if told["secret"]:
        raise UserError(
            f"{len(told['secret']):,} secrets as values of groups, nothing was added\n{_places(told['secret'])}",
            fix="Group by something else, or add the rows with --redact, which puts a digest in the value's place.",
        )
    if told["personal"]:
        reporter.warn(
            f"personal data as values of groups, which are kept with the version as they are; --redact puts digests in "
            f"their place.\n{_places(told['personal'])}"
        )
    return clean


def _places(told: Sequence[str]) -> str:
    return listed(told, len(told), _MOST, "--redact replaces all of them")
