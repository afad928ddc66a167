"""Tenants: access to aliases, limits, API keys and usage."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from starlette.responses import Response

from tunewright.core.clock import minute
from tunewright.core.errors import UserError
from tunewright.serving.options import LimitOptions
from tunewright.serving.serve import has_state
from tunewright.studio.jobs import Served, served
from tunewright.studio.pages.deploy import follows_releases, newest_releases, require_state
from tunewright.studio.visit import Handlers, Visit, in_form, path_of

if TYPE_CHECKING:
    from tunewright.serving.tenants import State
    from tunewright.serving.tenants.quota import Limits
    from tunewright.serving.tenants.tenants import NewKey, Tenant
    from tunewright.serving.tenants.usage import DayTotal, UsageSum

_DAYS = 30  # of usage
_DAY = 86_400
TENANT_PAGE = "/tenants/{tenant}"
_TICKED = "alias "
"""Begins the name of an alias's checkbox."""
_LIMITS = ("requests", "tokens", "concurrency")
_AGAIN = "Check the form, and send it again to set yours."


@dataclass(frozen=True)
class Day:
    """The usage of one day (UTC)."""

    day: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


def tenants_page(visit: Visit) -> Response:
    """Show all tenants and their usage."""
    from tunewright.serving.tenants.blocks import tenants_table, usage_table

    tenants: Sequence[Tenant] = ()
    days: Sequence[Day] = ()
    sums: Sequence[UsageSum] = ()
    if has_state(visit.project):
        with visit.project.state() as state:
            tenants, sums = state.tenants.list(), state.usage.sums()
            days = _days(state.usage.by_day(None, _since()))
    return visit.page(
        "tenants.html.j2",
        "Tenants",
        tenants=[tenants_table(tenants)] if tenants else [],
        live=_offered(visit),
        ticked=_ticked(visit),
        days=days,
        usage=[usage_table(sums)] if sums else [],
    )


def _offered(visit: Visit, more: Sequence[str] = ()) -> list[tuple[str, bool]]:
    """Return the live aliases and ``more``, sorted by name, each with whether it is live."""
    live = {release.alias for release in newest_releases(visit.project) if not release.undeployed}
    return [(alias, alias in live) for alias in sorted(live | set(more))]


def _since() -> float:
    """Return the beginning of the first day that is shown."""
    return (time.time() // _DAY - _DAYS + 1) * _DAY


def _days(totals: Sequence[DayTotal]) -> list[Day]:
    """Return every day up to today, including days without a request."""
    sums: dict[str, Counter[str]] = {}
    for total in totals:
        sums.setdefault(total.day, Counter()).update(total.counts)
    first = datetime.fromtimestamp(_since(), UTC)
    days = [(first + timedelta(days=number)).date().isoformat() for number in range(_DAYS)]
    names = ("requests", "prompt_tokens", "completion_tokens")
    return [Day(day, *(sums.get(day, Counter())[name] for name in names)) for day in days]


def add_tenant(visit: Visit) -> Response:
    """Create a tenant."""
    from tunewright.serving.tenants.quota import Limits

    name = visit.form.get("name", "").strip()
    with visit.project.state(make=True) as state:
        made = state.tenants.add(name, _aliases(visit), _limits(visit, Limits()))
        state.releases.report_unreleased(made.aliases, visit.project.reporter)
    return visit.go(path_of("tenants", made.name), f"Tenant {made.name} created. Every request needs an API key now.")


def tenant_page(visit: Visit) -> Response:
    """Show one tenant: aliases, limits, keys and usage."""
    from tunewright.serving.tenants.blocks import usage_table

    require_state(visit)
    name = visit.place["tenant"]
    with visit.project.state() as state:
        tenant, keys, sums = state.tenants.get(name), state.keys.list(name), state.usage.sums(name)
        days = _days(state.usage.by_day(name, _since()))
    return visit.page(
        "tenant.html.j2",
        f"Tenant {name}",
        tenant=tenant,
        offered=_offered(visit, tenant.aliases),
        ticked=_ticked(visit),
        limits=dict(zip(_LIMITS, _shown(tenant.limits), strict=True)),
        keys=keys,
        rotated=visit.place.get("key", "") if "overlap" in visit.form else "",
        days=days,
        usage=[usage_table(sums)] if sums else [],
        minute=minute,
    )


def _shown(limits: Limits) -> tuple[str, ...]:
    values = (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrency)
    return tuple("none" if value is None else str(value) for value in values)


def change_aliases(visit: Visit) -> Response:
    """Let a tenant call the ticked and typed aliases, and no others."""
    name, wanted = visit.place["tenant"], _aliases(visit)
    with visit.project.state() as state:
        before = state.tenants.get(name).aliases
        # A page of an earlier state must not undo what another tab or the terminal has set.
        if visit.form.get("seen") != " ".join(before):
            what = f"The aliases were changed meanwhile, to {', '.join(before) or 'none'}. Nothing was done"
            raise UserError(what, fix=_AGAIN)
        granted = [alias for alias in wanted if alias not in before]
        revoked = [alias for alias in before if alias not in wanted]
        if granted:  # first: an invalid name changes nothing
            state.tenants.grant(name, granted)
            state.releases.report_unreleased(granted, visit.project.reporter)
        if revoked:
            state.tenants.revoke(name, revoked)
    verbs = {"may call": granted, "no longer calls": revoked}
    changes = [f"{verb} {', '.join(names)}" for verb, names in verbs.items() if names]
    said = f"{name} {' and '.join(changes)}, from its next request on." if changes else "Nothing was changed."
    return visit.go(path_of("tenants", name), said)


def change_limits(visit: Visit) -> Response:
    """Set a tenant's limits."""
    name = visit.place["tenant"]
    with visit.project.state() as state:
        found = state.tenants.get(name)
        # A page of an earlier state must not undo what another tab or the terminal has set.
        if visit.form.get("seen") != ", ".join(_shown(found.limits)):
            now = ", ".join(f"{name} {value}" for name, value in zip(_LIMITS, _shown(found.limits), strict=True))
            raise UserError(f"The limits were changed meanwhile, to {now}. Nothing was done", fix=_AGAIN)
        state.tenants.limit(name, _limits(visit, found.limits))
    return visit.go(path_of("tenants", name), f"The limits of {name} hold from its next request on.")


def _limits(visit: Visit, before: Limits) -> Limits:
    from tunewright.serving.tenants.quota import changed_limits

    given = {name: visit.form.get(name, "").strip() or None for name in _LIMITS}
    return changed_limits(before, LimitOptions(**given))


def disable_tenant(visit: Visit) -> Response:
    """Revoke all of a tenant's keys and aliases."""
    name = visit.place["tenant"]
    if visit.form.get("name") != name:
        raise UserError("The typed name is another one. Nothing was done", fix=f"Type {name} to disable it.")
    with visit.project.state() as state:
        state.tenants.disable(name)
    return visit.go(path_of("tenants", name), f"{name} has no keys and no aliases any more. Its usage is kept.")


def add_key(visit: Visit) -> Response:
    """Create a key, and show it this once."""
    name = visit.place["tenant"]
    with visit.project.state() as state:
        _require_same_keys(visit, state)
        made = state.keys.create(name, aliases=_aliases(visit) or None, lifetime=_seconds(visit, "expires"))
        tenant = state.tenants.get(name)
    return _key_page(visit, made, tenant)


def rotate_key(visit: Visit) -> Response:
    """Replace a key by a new one, and show it this once."""
    with visit.project.state() as state:
        _require_same_keys(visit, state)
        key, lifetime = _own_key(visit, state), _seconds(visit, "expires")
        made = state.keys.rotate(key, overlap=_seconds(visit, "overlap") or 0.0, lifetime=lifetime)
        tenant = state.tenants.get(visit.place["tenant"])
    return _key_page(visit, made, tenant)


def _key_page(visit: Visit, made: NewKey, tenant: Tenant) -> Response:
    # The answer to the form itself, which no browser keeps: an address or a stored message would keep the key.
    server = visit.jobs.server()
    running = server and served(server)
    aliases = tenant.aliases if made.key.aliases is None else tuple(made.key.aliases)
    return visit.page(
        "key.html.j2",
        "New API key",
        made=made,
        tenant=tenant.name,
        served=Served(running.url if running and follows_releases(visit, running) else "", aliases),
        minute=minute,
    )


def revoke_key(visit: Visit) -> Response:
    """Revoke a key."""
    with visit.project.state() as state:
        revoked = state.keys.revoke(_own_key(visit, state))
    return visit.go(path_of("tenants", visit.place["tenant"]), f"{revoked.prefix} is revoked from the next request on.")


def _own_key(visit: Visit, state: State) -> str:
    prefix = visit.place["key"]
    if prefix not in {key.prefix for key in state.keys.list(visit.place["tenant"])}:
        raise UserError(f"{visit.place['tenant']} has no key {prefix!r}", fix="Go back and choose one of the list.")
    return prefix


def _require_same_keys(visit: Visit, state: State) -> None:
    """Refuse a form that was sent twice, or whose page is older than the newest key."""
    tenant = visit.place["tenant"]
    if visit.form.get("seen") != str(len(state.keys.list(tenant))):
        raise UserError(
            "The keys were changed meanwhile. No key was made",
            fix=f"Look at the page of {tenant}. A key that nobody wrote down can be revoked there.",
        )


def _aliases(visit: Visit) -> list[str]:
    """Return the ticked and the typed aliases."""
    typed = visit.form.get("aliases", "").replace(",", " ").split()
    return list(dict.fromkeys([*_ticked(visit), *typed]))


def _ticked(visit: Visit) -> list[str]:
    return [field.removeprefix(_TICKED) for field in visit.form if field.startswith(_TICKED)]


def _seconds(visit: Visit, field: str) -> float | None:
    from tunewright.serving.tenants.database import duration

    text = visit.form.get(field, "").strip()
    return duration(text, field) if text else None


HANDLERS: Handlers = {
    ("GET", "/tenants"): tenants_page,
    ("POST", "/tenants"): in_form("/tenants", tenants_page, add_tenant),
    ("GET", TENANT_PAGE): tenant_page,
    **{
        ("POST", f"{TENANT_PAGE}/{form}"): in_form(TENANT_PAGE, tenant_page, handler)
        for form, handler in {
            "aliases": change_aliases,
            "limits": change_limits,
            "disable": disable_tenant,
            "keys": add_key,
            "keys/{key}/rotate": rotate_key,
            "keys/{key}/revoke": revoke_key,
        }.items()
    },
}
