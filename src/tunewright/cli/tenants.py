"""``tenant`` and ``audit``: who may call what and how much, their keys, their usage, and the record of changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import FAILED, Session, session
from tunewright.cli.state import StateUrl, project_at

if TYPE_CHECKING:
    from tunewright.api.tenants import NewKey

tenant_app = typer.Typer(help="Who may call which alias, and how much.", no_args_is_help=True)
key_app = typer.Typer(help="A tenant's API keys.", no_args_is_help=True)
audit_app = typer.Typer(help="The record of all changes to tenants, keys, limits and releases.", no_args_is_help=True)
tenant_app.add_typer(key_app, name="key")
app.add_typer(tenant_app, name="tenant")
app.add_typer(audit_app, name="audit")

Name = Annotated[str, typer.Argument(help="The tenant's name.")]
Aliases = Annotated[list[str], typer.Argument(help="Aliases.")]
Prefix = Annotated[str, typer.Argument(help="The key's prefix, as `tenant key list` shows it.")]
Expires = Annotated[
    str | None, typer.Option(help="How long the key is good for, such as 90d.", show_default="without end")
]
Requests = Annotated[str | None, typer.Option("--requests", help="Requests a minute, or none.")]
Tokens = Annotated[str | None, typer.Option("--tokens", help="Tokens a minute, prompt and answer, or none.")]
AtOnce = Annotated[str | None, typer.Option("--concurrency", help="Requests at once, or none.")]


@tenant_app.command("add")
def tenant_add(
    name: Name,
    alias: Annotated[list[str] | None, typer.Option(help="An alias that it may call; several.")] = None,
    requests: Requests = None,
    tokens: Tokens = None,
    concurrency: AtOnce = None,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Make a tenant. From the first one on, the server asks everybody for a key."""
    from tunewright.cli.tenant_tables import tenants_table
    from tunewright.serving.state import Limits
    from tunewright.serving.state.limits import changed_limits

    with session(json) as current:
        limits = changed_limits(Limits(), requests=requests, tokens=tokens, concurrency=concurrency)
        made = project_at(current, project, state).tenant.add(name, alias or (), limits)
        told = f"`tunewright tenant key add {name}` makes a key for it."
        current.show(made.as_dict(), tenants_table([made]), told)


@tenant_app.command("list")
def tenant_list(state: StateUrl = None, project: Folder = HERE, json: Json = False) -> None:
    """List the tenants with their aliases and limits."""
    from tunewright.cli.tenant_tables import tenants_table

    with session(json) as current:
        known = project_at(current, project, state).tenant.list()
        document = {"tenants": [tenant.as_dict() for tenant in known]}
        current.show(document, tenants_table(known) if known else "There is no tenant: the server asks for no key.")


@tenant_app.command("allow")
def tenant_allow(
    name: Name, aliases: Aliases, state: StateUrl = None, project: Folder = HERE, json: Json = False
) -> None:
    """Let a tenant call further aliases."""
    from tunewright.cli.tenant_tables import tenants_table

    with session(json) as current:
        changed = project_at(current, project, state).tenant.allow(name, aliases)
        current.show(changed.as_dict(), tenants_table([changed]))


@tenant_app.command("deny")
def tenant_deny(
    name: Name, aliases: Aliases, state: StateUrl = None, project: Folder = HERE, json: Json = False
) -> None:
    """Take aliases from a tenant, from its next request on."""
    from tunewright.cli.tenant_tables import tenants_table

    with session(json) as current:
        changed = project_at(current, project, state).tenant.deny(name, aliases)
        current.show(changed.as_dict(), tenants_table([changed]))


@tenant_app.command("end")
def tenant_end(name: Name, state: StateUrl = None, project: Folder = HERE, json: Json = False) -> None:
    """Revoke all of a tenant's keys and take its aliases, from the next request on. Its usage stays."""
    from tunewright.cli.tenant_tables import tenants_table

    with session(json) as current:
        ended = project_at(current, project, state).tenant.end(name)
        told = f"What {name} could call answers on: `tunewright withdraw ALIAS` ends that."
        current.show(ended.as_dict(), tenants_table([ended]), told)


@tenant_app.command("limit")
def tenant_limit(
    name: Name,
    requests: Requests = None,
    tokens: Tokens = None,
    concurrency: AtOnce = None,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Show a tenant's limits, or change those that are given. They hold from its next request on."""
    from tunewright.cli.tenant_tables import tenants_table
    from tunewright.serving.state.limits import changed_limits

    with session(json) as current:
        opened = project_at(current, project, state)
        found = opened.tenant.get(name)
        limits = changed_limits(found.limits, requests=requests, tokens=tokens, concurrency=concurrency)
        if limits != found.limits:
            found = opened.tenant.limit(name, limits)
        current.show(found.as_dict(), tenants_table([found]))


@tenant_app.command("usage")
def tenant_usage(
    name: Annotated[str | None, typer.Argument(help="The tenant's name.", show_default="all")] = None,
    since: Annotated[str | None, typer.Option(help="From this day on, such as 2026-11-01.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Every request, as CSV on stdout.")] = False,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Requests and tokens by tenant, alias and adapter."""
    from tunewright.cli.tenant_tables import usage_table
    from tunewright.core.errors import UserError
    from tunewright.serving.state.times import moment
    from tunewright.serving.state.usage_csv import usage_csv

    with session(json) as current:
        if csv and json:
            raise UserError("stdout has either CSV or JSON", where="--csv", fix="Leave one of them out.")
        begins = None if since is None else moment(since, "--since")
        opened = project_at(current, project, state)
        if csv:
            current.print_out(usage_csv(opened.tenant.requests(name, since=begins)))
            return
        sums = opened.tenant.usage(name, since=begins)
        current.show({"usage": [each.as_dict() for each in sums]}, usage_table(sums) if sums else "No requests yet.")


@tenant_app.command("prune-usage")
def tenant_prune_usage(
    before: Annotated[str, typer.Option(help="A day, such as 2026-11-01: requests of earlier days are pruned.")],
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Make sums by day of old requests, whose lines go. `tenant usage` stays what it was."""
    from tunewright.serving.state.times import moment

    with session(json) as current:
        pruned = project_at(current, project, state).tenant.prune_usage(before=moment(before, "--before"))
        told = f"Requests that became sums: {pruned.requests:,}, of {pruned.days:,} days."
        if pruned.shadow_answers:
            told += f" With them went what candidates in the shadow said: {pruned.shadow_answers:,} answers."
        current.show(pruned.as_dict(), told)


@key_app.command("add")
def key_add(
    tenant: Annotated[str, typer.Argument(help="The tenant's name.")],
    alias: Annotated[
        list[str] | None,
        typer.Option(help="An alias that the key is good for; several.", show_default="all of the tenant's"),
    ] = None,
    expires: Expires = None,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Make a key. It is shown this once (on standard output, alone): only a hash of it is kept."""
    from tunewright.serving.state.times import duration

    with session(json) as current:
        lifetime = None if expires is None else duration(expires, "--expires")
        made = project_at(current, project, state).tenant.key.add(tenant, aliases=alias, lifetime=lifetime)
        _show_key(current, made)


@key_app.command("rotate")
def key_rotate(
    key: Prefix,
    overlap: Annotated[str, typer.Option(help="How long the old key stays good, such as 24h or 0s.")] = "24h",
    expires: Expires = None,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Make a key in another's place, with the same aliases; for a while both are good."""
    from tunewright.serving.state.times import duration

    with session(json) as current:
        lifetime = None if expires is None else duration(expires, "--expires")
        both = duration(overlap, "--overlap")
        made = project_at(current, project, state).tenant.key.rotate(key, overlap=both, lifetime=lifetime)
        _show_key(current, made, f"{key} is good for {overlap} more.")


def _show_key(current: Session, made: NewKey, *more: str) -> None:
    """The key alone on stdout, so that a script can take it and no log gets it."""
    from tunewright.cli.tenant_tables import new_key_text

    current.show(made.as_dict(), new_key_text(made), *more, alone=f"{made.secret}\n")


@key_app.command("revoke")
def key_revoke(key: Prefix, state: StateUrl = None, project: Folder = HERE, json: Json = False) -> None:
    """End a key, from the next request on. An answer under way is finished."""
    with session(json) as current:
        ended = project_at(current, project, state).tenant.key.revoke(key)
        current.show(ended.as_dict(), f"{ended.prefix} of {ended.tenant} is revoked.")


@key_app.command("list")
def key_list(
    tenant: Annotated[str | None, typer.Argument(help="The tenant's name.", show_default="all")] = None,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """List keys by their prefixes: whose, for what, until when, when last used."""
    from tunewright.cli.tenant_tables import keys_table

    with session(json) as current:
        known = project_at(current, project, state).tenant.key.list(tenant)
        current.show({"keys": [key.as_dict() for key in known]}, keys_table(known) if known else "There is no key.")


@audit_app.command("show")
def audit_show(state: StateUrl = None, project: Folder = HERE, json: Json = False) -> None:
    """List every change: who made it, when, and what it was."""
    from tunewright.cli.tenant_tables import audit_table

    with session(json) as current:
        lines = project_at(current, project, state).audit.show()
        document = {"lines": [line.as_dict() for line in lines]}
        current.show(document, audit_table(lines) if lines else "Nothing has been changed yet.")


@audit_app.command("verify")
def audit_verify(
    noted: Annotated[
        str | None, typer.Option(help="A line's digest that was noted elsewhere: it has to be there still.")
    ] = None,
    state: StateUrl = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Check every line against its digest and the one before. Exit code 1 where one was changed or is missing."""
    with session(json) as current:
        check = project_at(current, project, state).audit.verify(noted)
        whole = f"{check.lines} lines, all as written. The last one's digest, to be noted elsewhere: {check.head}"
        if not check.lines:
            whole = "Nothing has been changed yet: there is no line."
        current.show(check.as_dict(), "\n".join(check.faults) if check.faults else whole)
        if check.faults:
            raise typer.Exit(FAILED)
