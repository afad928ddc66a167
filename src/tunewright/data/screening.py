"""Secrets and personal data in rows that are added: refused, told, let through or replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunewright.data import secrets
from tunewright.data.formats import SourceRow
from tunewright.data.secrets.findings import Finder
from tunewright.data.secrets.names import open_presidio
from tunewright.progress import Reporter


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
