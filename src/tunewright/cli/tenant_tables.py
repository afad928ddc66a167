"""Tenants, keys, usage, releases and audit as people read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tunewright.api.tenants import NewKey
from tunewright.serving.state import AuditLine, Key, Release, Tenant
from tunewright.serving.state.meter import ShadowLine, UsageSum
from tunewright.serving.state.times import iso

if TYPE_CHECKING:
    from tunewright.demo_tenants import TwoTenants

_AUTHOR = 16  # columns for a name as git has it, which may be long
_SHORT = 12  # digits of a digest


def tenants_table(tenants: Sequence[Tenant]) -> Table:
    """Tenants; a dash where there is no limit."""
    table = Table()
    for name in ("tenant", "aliases"):
        table.add_column(name)
    for name in ("requests/min", "tokens/min", "at once", "keys"):
        table.add_column(name, justify="right")
    for tenant in tenants:
        limits = tenant.limits
        table.add_row(
            tenant.name,
            ", ".join(tenant.aliases) or "none",
            _count(limits.requests_per_minute),
            _count(limits.tokens_per_minute),
            _count(limits.concurrency),
            str(tenant.keys),
        )
    return table


def new_key_text(made: NewKey) -> str:
    """What to know of a key that is shown this once."""
    scope = "all aliases of" if made.key.aliases is None else f"{', '.join(made.key.aliases)} of"
    until = f" until {_minute(made.key.expires)} (UTC)" if made.key.expires is not None else ""
    return f"Good for {scope} {made.key.tenant}{until}. It is not shown again: only a hash is kept."


def keys_table(keys: Sequence[Key]) -> Table:
    """Keys by their prefixes."""
    table = Table()
    for name in ("key", "tenant", "aliases", "state", "made", "expires", "last used"):
        table.add_column(name, overflow="fold")
    for key in keys:
        state = key.state if key.replaced_by is None else f"{key.state}, replaced\nby {key.replaced_by}"
        table.add_row(
            key.prefix,
            key.tenant,
            "all" if key.aliases is None else ", ".join(key.aliases),
            state,
            _minute(key.created),
            _minute(key.expires),
            _minute(key.last_used),
        )
    return table


def usage_table(sums: Sequence[UsageSum]) -> Table:
    """Usage by tenant, alias and adapter; the time to the first token is the mean."""
    table = Table()
    for name in ("tenant", "alias", "adapter"):
        table.add_column(name)
    for name in ("requests", "under way", "prompt tokens", "answer tokens", "first token, s"):
        table.add_column(name, justify="right")
    for each in sums:
        first = each.mean_first_token_s
        table.add_row(
            each.tenant,
            each.alias,
            each.digest[:_SHORT],
            f"{each.requests:,}",
            f"{each.under_way:,}",
            f"{each.prompt_tokens:,}",
            f"{each.completion_tokens:,}",
            "-" if first is None else f"{first:.3f}",
        )
    return table


def releases_tables(releases: Sequence[Release]) -> list[RenderableType]:
    """Releases, with the candidate that was tried beside each, and why any was forced."""
    table = Table()
    for name in ("release", "action", "answers with", "verdict", "isolation test", "by", "when"):
        table.add_column(name, overflow="fold", max_width=_AUTHOR if name == "by" else None)
    for release in releases:
        candidate = "" if release.candidate is None else f"\n{release.candidate.adapter}\n{release.candidate.told}"
        bare = "" if release.system_prompt else "\nwithout its system prompt"
        verdict = "" if release.withdrawn else release.grounds.verdict or "not evaluated"
        restores = "" if release.restores is None else f" to {release.restores}"
        table.add_row(
            f"{release.alias} {release.number}",
            f"{release.action}{restores}",
            f"nothing; was\n{release.adapter}" if release.withdrawn else f"{release.adapter}{bare}{candidate}",
            f"{verdict},\nforced" if release.grounds.because is not None and not release.withdrawn else verdict,
            _isolation(release),
            release.author or "",
            _minute(release.created),
        )
    made_known = ("deploy", "canary", "shadow")
    forced = [each for each in releases if each.grounds.because is not None and each.action in made_known]
    untested = [each for each in releases if each.grounds.untested is not None and each.action != "rollback"]
    ended = [each for each in releases if each.withdrawn and each.grounds.because is not None]
    return [
        table,
        *(f"{each.alias} {each.number} was forced: {each.grounds.because}" for each in forced),
        *(f"{each.alias} {each.number} was not tested: {each.grounds.untested}" for each in untested),
        *(f"{each.alias} {each.number} was withdrawn: {each.grounds.because}" for each in ended),
    ]


def _isolation(release: Release) -> str:
    test = release.grounds.isolation
    if test is None:
        if release.withdrawn:
            return ""
        return "none" if release.grounds.untested is None else "left out"
    return f"{test.verdict}\non {test.engine},\n{test.tested[:16].replace('T', ' ')}"


def two_tenants_tables(shown: TwoTenants) -> list[RenderableType]:
    """Two tenants on one server: what each sees, gets and has used."""
    told = f"Two tenants on one base, asked: {shown.question}\nReference: {shown.reference}"
    table = Table(title=told, title_justify="left")
    for name in ("tenant", "sees", "answered by", "answer", "the other's alias", "used"):
        table.add_column(name, overflow="fold")
    for visit in shown.visits:
        refused = f"{visit.others_alias}, as one\nthat is not there" if visit.same_refusal else str(visit.others_alias)
        table.add_row(
            visit.tenant,
            ", ".join(visit.sees),
            visit.answered_by[:_SHORT],
            Text(visit.answer),
            refused,
            f"{visit.requests} request{'' if visit.requests == 1 else 's'}\n{visit.tokens} tokens",
        )
    return [
        *releases_tables(shown.releases),
        table,
        f"All of it is in the state: tunewright releases --state {shown.state}",
    ]


def shadow_tables(lines: Sequence[ShadowLine], differing: int = 10) -> list[RenderableType]:
    """How often candidates would have said the same, and the newest answers that differ."""
    if not lines:
        return ["No candidate has been asked in the shadow yet."]
    by_candidate: dict[str, list[ShadowLine]] = {}
    for line in lines:
        by_candidate.setdefault(line.candidate, []).append(line)
    counts = Table()
    counts.add_column("candidate")
    for name in ("asked", "the same", "other", "no answer"):
        counts.add_column(name, justify="right")
    for candidate, asked in by_candidate.items():
        answered = [line for line in asked if line.shadow_answer is not None]
        same = sum(line.shadow_answer == line.answer for line in answered)
        counts.add_row(candidate, *map(str, (len(asked), same, len(answered) - same, len(asked) - len(answered))))
    others = [line for line in lines if line.shadow_answer not in (None, line.answer)]
    if not others:
        return [counts]
    pairs = Table(title=f"The newest {min(differing, len(others))} that differ", title_justify="left", show_lines=True)
    for name in ("request", "tenant", "answered", "in the shadow"):
        pairs.add_column(name)
    for line in others[-differing:]:
        pairs.add_row(str(line.request), line.tenant, line.answer, line.shadow_answer)
    return [counts, pairs]


def audit_table(lines: Sequence[AuditLine]) -> Table:
    """The log of changes."""
    table = Table()
    table.add_column("line", justify="right")
    for name in ("when", "by", "what", "of", "details"):
        table.add_column(name, overflow="fold", max_width=_AUTHOR if name == "by" else None)
    for line in lines:
        told = ", ".join(_details(json.loads(line.details)))
        table.add_row(
            str(line.number), line.time[:16].replace("T", " "), line.actor or "", line.action, line.subject, told
        )
    return table


_TOLD_ALREADY = {"id", "alias", "author", "created", "action", "digest"}


def _details(details: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A line's details in words: what is empty, or told by the other columns, is left out."""
    for name, value in details.items():
        if value in (None, [], "") or name in _TOLD_ALREADY:
            continue
        words = prefix + name.replace("_", " ")
        if name == "system_prompt":
            if not value:
                yield f"{prefix}without its system prompt"
        elif name == "isolation":
            yield f"isolation test: {value['verdict']} on {value['engine']}, {value['tested'][:16].replace('T', ' ')}"
            if value["verdict"] != "isolated":
                yield from value["reasons"]
        elif isinstance(value, dict):
            yield from _details(value, "" if name == "grounds" else f"{words} ")
        elif name.endswith("expires"):
            yield f"{words} {_minute(value)}"
        else:
            yield f"{words} {', '.join(value) if isinstance(value, list) else value}"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _minute(seconds: float | None) -> str:
    told = iso(seconds)
    return "-" if told is None else told[:16].replace("T", " ")
