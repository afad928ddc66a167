"""Layout of the serving state: tenants and keys, usage, releases and their shadows, and the audit log."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunewright.core.clock import minute
from tunewright.core.text import count_of
from tunewright.render.blocks import Block, Cell, Column, Lead, Notes, Table, table, words
from tunewright.serving.tenants.audit import AuditLine
from tunewright.serving.tenants.feedback import FeedbackSum
from tunewright.serving.tenants.records import Recording
from tunewright.serving.tenants.releases import Candidate, Release
from tunewright.serving.tenants.tenants import Key, Tenant
from tunewright.serving.tenants.usage import DayTotal, ShadowLine, UsageSum

_SHORT = 12  # digits of a digest
_DIFFERING = 10  # answers of shadows
_TENANT: str | Column = Column("Tenant", words=True, of="tenant")
_ALIAS: str | Column = Column("Alias", words=True, of="alias")
_ADAPTER: str | Column = Column("Adapter", words=True, of="digest")


def tenants_table(tenants: Sequence[Tenant]) -> Table:
    """Return tenants with their aliases and limits, with a dash for no limit."""
    head = (_TENANT, *words("Aliases"), "Requests/min", "Tokens/min", "Concurrency", "Valid keys")
    rows = []
    for each in tenants:
        limits = (each.limits.requests_per_minute, each.limits.tokens_per_minute, each.limits.concurrency)
        counts = ("-" if limit is None else f"{limit:,}" for limit in limits)
        rows.append((each.name, ", ".join(each.aliases) or "none", *counts, f"{each.keys}"))
    return table("Tenants", head, rows)


def keys_table(keys: Sequence[Key]) -> Table:
    """Return keys by prefix."""
    head = (Column("Key", words=True), _TENANT, *words("Aliases", "State", "Made", "Expires", "Last used"))
    rows = []
    for key in keys:
        state = key.state if key.replaced_by is None else f"{key.state}, replaced by {key.replaced_by}"
        aliases = "all" if key.aliases is None else ", ".join(key.aliases)
        rows.append((key.prefix, key.tenant, aliases, state, *map(minute, (key.created, key.expires, key.last_used))))
    return table("API keys", head, rows)


def usage_table(sums: Sequence[UsageSum], now: Release | None = None) -> Table:
    """Return usage by tenant, alias and adapter; of an alias with the part that each adapter has ``now``."""
    parts = {} if now is None else {now.digest: "live"}
    if now is not None and now.candidate is not None:
        parts = {now.candidate.digest: "candidate"} | parts
    head = (_TENANT, _ALIAS, _ADAPTER, "Requests", "In progress", "Prompt tokens", "Answer tokens", "First token, s")
    rows: list[tuple[str | Cell, ...]] = []
    for each in sums:
        adapter = Cell(each.digest[:_SHORT], parts.get(each.digest, ""))
        counts = (each.requests, each.in_flight, each.prompt_tokens, each.completion_tokens)
        first = "-" if each.mean_first_token_s is None else f"{each.mean_first_token_s:.3f}"
        rows.append((each.tenant, each.alias, adapter, *(f"{count:,}" for count in counts), first))
    return table("Usage by adapter", head, rows)


def days_table(days: Sequence[DayTotal]) -> Table:
    """Return usage by day, tenant, alias and adapter."""
    head = ("Day", _TENANT, _ALIAS, _ADAPTER, "Requests", "Prompt tokens", "Answer tokens")
    rows = []
    for each in days:
        counts = (f"{count:,}" for count in (each.requests, each.prompt_tokens, each.completion_tokens))
        rows.append((each.day, each.tenant, each.alias, each.digest[:_SHORT], *counts))
    return table("Usage by day", head, rows)


def feedback_table(sums: Sequence[FeedbackSum]) -> Table:
    """Return counts of feedback by alias and adapter."""
    rows = []
    for each in sums:
        mean = "-" if each.mean_score is None else f"{each.mean_score:.3f}"
        up, down, corrections = (f"{count:,}" for count in (each.up, each.down, each.corrections))
        rows.append((each.alias, each.digest[:_SHORT], f"{each.answers:,}", up, down, mean, corrections))
    head = (_ALIAS, _ADAPTER, "Answers with feedback", "Up", "Down", "Mean score", "Corrections")
    return table("Feedback by adapter", head, rows)


def recordings_table(recordings: Sequence[Recording]) -> Table:
    """Return the terms on which tenants are recorded, and counts of their records."""
    rows = []
    for each in recordings:
        state = "recording" if each.stopped is None else f"stopped {each.stopped[:10]}"
        terms = (each.contract, state, f"{each.days}", f"{100 * each.share:.4g}%")
        units = ", ".join(count_of(count, kind) for kind, count in each.units.items()) or "-"
        oldest = "-" if each.oldest is None else each.oldest[:10]
        rows.append((each.tenant, *terms, f"{each.records:,}", units, f"{each.dropped:,}", oldest))
    head = (_TENANT, *words("Contract", "State"), "Days", "Share", "Records", *words("Units"), "Dropped", "Oldest")
    return table("Recorded requests", head, rows)


def releases_blocks(releases: Sequence[Release]) -> tuple[Block, ...]:
    """Return the releases, each with its candidate, and the reasons for forced releases."""
    head = (
        "Release",
        *words("Action", "Answers with", "Verdict", "Isolation test", "Serving check", "By", "When (UTC)"),
    )
    found = table("Releases", head, map(_release, releases))
    reasons = []
    for each in releases:
        name, grounds = f"{each.alias} {each.number}", each.grounds
        if grounds.because is not None and each.action in ("deploy", "canary", "shadow"):
            reasons.append(f"{name} was forced: {grounds.because}")
        if grounds.untested is not None and each.action != "rollback":
            reasons.append(f"{name} was not tested: {grounds.untested}")
        if grounds.shadow is not None and each.action == "promote":
            reasons.append(f"{name}, in the shadow, by people's verdicts: {grounds.shadow.summary}")
        if grounds.because is not None and each.undeployed:
            reasons.append(f"{name} was undeployed: {grounds.because}")
    return (found, Notes(tuple(reasons))) if reasons else (found,)


def _release(each: Release) -> tuple[str, ...]:
    restores = "" if each.restores is None else f" to {each.restores}"
    made = (each.author or "", minute(each.created))
    name = f"{each.alias} {each.number}"
    if each.undeployed:
        return (name, each.action, f"nothing; was {each.adapter}", "", "", "", *made)
    grounds = each.grounds
    without = "none" if grounds.untested is None else "left out"
    isolation = serving = without
    if grounds.isolation is not None:
        isolation = f"{grounds.isolation.summary}, {grounds.isolation.tested[:16].replace('T', ' ')}"
    if grounds.serving is not None:
        own = next(figures for figures in grounds.serving.figures if figures.served == "adapter")
        serving = f"{grounds.serving.summary}, {100 * own.same.value:.0f}% the same"
    verdict = (grounds.verdict or "not evaluated") + ("" if grounds.because is None else ", forced")
    return (name, f"{each.action}{restores}", _answers_with(each, each.candidate), verdict, isolation, serving, *made)


def _answers_with(each: Release, candidate: Candidate | None) -> str:
    bare = "" if each.system_prompt else ", without its system prompt"
    constrained = "" if each.grammar is None else ", constrained"
    on_trial = "" if candidate is None else f"; {candidate.adapter} {candidate.summary}"
    return f"{each.adapter}{bare}{constrained}{on_trial}"


def shadow_blocks(lines: Sequence[ShadowLine]) -> tuple[Block, ...]:
    """Return counts of identical and other answers by shadow candidate, and the newest that differ."""
    if not lines:
        return (Lead("No shadow candidate has answered yet."),)
    rows = []
    for candidate in dict.fromkeys(line.candidate for line in lines):
        asked = [line for line in lines if line.candidate == candidate]
        same, other = sum(line.shadow_answer == line.answer for line in asked), len(_differing(asked))
        rows.append((candidate, *(f"{n:,}" for n in (len(asked), same, other, len(asked) - same - other))))
    counts = table("Answers in the shadow", ("Candidate", "Asked", "The same", "Other", "No answer"), rows)
    newest = _differing(lines)[: -_DIFFERING - 1 : -1]
    if not newest:
        return (counts,)
    pairs = table(
        "Answers that differ",
        ("Request", _TENANT, *words("Answered", "In the shadow")),
        ((f"{line.request}", line.tenant, line.answer, line.shadow_answer or "") for line in newest),
    )
    return (counts, Lead(f"The newest {len(newest)} that differ:"), pairs)


def _differing(lines: Sequence[ShadowLine]) -> list[ShadowLine]:
    return [line for line in lines if line.shadow_answer not in (None, line.answer)]


def audit_table(lines: Sequence[AuditLine]) -> Table:
    """Return changes to tenants, keys, limits and releases."""
    rows = (
        (
            f"{line.number}",
            line.time[:16].replace("T", " "),
            line.actor or "",
            line.action,
            line.subject,
            ", ".join(_details(json.loads(line.details))),
        )
        for line in lines
    )
    return table("Audit log", (Column("Line"), *words("When (UTC)", "By", "What", "Of", "Details")), rows)


_IN_OTHER_COLUMNS = {"id", "alias", "author", "created", "action", "digest"}
_ELSEWHERE = {"totals"}  # `tenant usage` shows them


def _details(details: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a line's details in words, without empty ones and ones in other columns."""
    for name, value in details.items():
        if value in (None, [], "") or name in _IN_OTHER_COLUMNS | _ELSEWHERE:
            continue
        words = prefix + name.replace("_", " ")
        if name == "system_prompt":
            if not value:
                yield f"{prefix}without its system prompt"
        elif name == "isolation":
            yield f"isolation test: {value['verdict']} on {value['engine']}, {value['tested'][:16].replace('T', ' ')}"
            if value["verdict"] != "isolated":
                yield from value["reasons"]
        elif name == "serving":
            passed = "failed" if value["reasons"] else "passed"
            yield f"serving check: {passed} on {value['engine']}, {value['checked'][:16].replace('T', ' ')}"
            yield from value["reasons"]
        elif isinstance(value, dict):
            yield from _details(value, "" if name == "grounds" else f"{words} ")
        elif name.endswith("expires"):
            yield f"{words} {minute(value)}"
        else:
            yield f"{words} {', '.join(value) if isinstance(value, list) else value}"
