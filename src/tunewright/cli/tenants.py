"""``tenant`` and ``audit``: access to aliases, limits, API keys and usage, and the record of all changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import DEPLOY, command, given_options, group, refuse_unused
from tunewright.cli.console import FAILED, Session
from tunewright.core.clock import minute
from tunewright.core.errors import UserError
from tunewright.core.text import count_of
from tunewright.serving.options import LimitOptions, RecordOptions

if TYPE_CHECKING:
    from tunewright.render import blocks
    from tunewright.serving.tenants.tenants import NewKey, Tenant

tenant_app = group("tenant", DEPLOY, "Manage tenants: aliases, limits, API keys and usage.")
key_app = group("key", DEPLOY, "Manage a tenant's API keys.", within=tenant_app)

Name = Annotated[str, typer.Argument(help="Name of the tenant.")]
AnyName = Annotated[str | None, typer.Argument(help="Name of the tenant.", show_default="all")]
Aliases = Annotated[list[str], typer.Argument(help="Aliases.")]
Prefix = Annotated[str, typer.Argument(help="Prefix of the key, as `tenant key list` shows it.")]
Expires = Annotated[str | None, typer.Option(help="Lifetime of the key, such as 90d.", show_default="unlimited")]


@command(
    tenant_app,
    "add",
    example="tunewright tenant add acme --alias legal --requests 60",
    status=False,
    database=True,
    options=LimitOptions,
)
def tenant_add(
    run: Session,
    name: Name,
    alias: Annotated[list[str] | None, typer.Option(help="Alias the tenant may call (repeatable).")] = None,
    options: LimitOptions = LimitOptions(),
) -> None:
    """Add a tenant. Once a tenant exists, every request needs an API key."""
    from tunewright.serving.tenants.quota import Limits, changed_limits

    limits = changed_limits(Limits(), options)
    with run.project.state(make=True) as state:
        made = state.tenants.add(name, alias or (), limits)
        state.releases.report_unreleased(made.aliases, run.reporter)
    run.show(made, _tenants(made), f"`tunewright tenant key add {name}` makes a key for it.")


@command(tenant_app, "list", example="tunewright tenant list", status=False, database=True)
def tenant_list(run: Session) -> None:
    """List the tenants with their aliases and limits."""
    with run.project.state() as state:
        known = state.tenants.list()
    document = {"tenants": known}
    run.show(document, _tenants(*known) if known else "No tenants: the server requires no key.")


@command(tenant_app, "grant", example="tunewright tenant grant acme legal", status=False, database=True)
def tenant_grant(run: Session, name: Name, aliases: Aliases) -> None:
    """Let a tenant call more aliases."""
    with run.project.state() as state:
        changed = state.tenants.grant(name, aliases)
        state.releases.report_unreleased(aliases, run.reporter)
    run.show(changed, _tenants(changed))


@command(tenant_app, "revoke", example="tunewright tenant revoke acme legal", status=False, database=True)
def tenant_revoke(run: Session, name: Name, aliases: Aliases) -> None:
    """Stop a tenant from calling aliases, from its next request on."""
    with run.project.state() as state:
        changed = state.tenants.revoke(name, aliases)
    run.show(changed, _tenants(changed))


@command(tenant_app, "disable", example="tunewright tenant disable acme", status=False, database=True)
def tenant_disable(run: Session, name: Name) -> None:
    """Revoke all of a tenant's keys and aliases, from the next request on. Its usage is kept."""
    with run.project.state() as state:
        disabled = state.tenants.disable(name)
    text = f"The aliases that {name} could call still answer: `tunewright undeploy ALIAS` stops one."
    run.show(disabled, _tenants(disabled), text)


@command(
    tenant_app,
    "limit",
    example="tunewright tenant limit acme --tokens 100000",
    status=False,
    database=True,
    options=LimitOptions,
)
def tenant_limit(run: Session, name: Name, options: LimitOptions = LimitOptions()) -> None:
    """Show a tenant's limits or change them, from its next request on."""
    from tunewright.serving.tenants.quota import changed_limits

    with run.project.state() as state:
        found = state.tenants.get(name)
        limits = changed_limits(found.limits, options)
        if limits != found.limits:
            found = state.tenants.limit(name, limits)
    run.show(found, _tenants(found))


@command(tenant_app, "usage", example="tunewright tenant usage acme --since 2026-11-01", status=False, database=True)
def tenant_usage(
    run: Session,
    name: AnyName = None,
    since: Annotated[str | None, typer.Option(help="First day, such as 2026-11-01.")] = None,
    by_day: Annotated[bool, typer.Option("--by-day", help="Show each day (UTC) by itself.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print every request as CSV on stdout.")] = False,
) -> None:
    """Show requests and tokens by tenant, alias and adapter."""
    from tunewright.serving.tenants.blocks import days_table, usage_table
    from tunewright.serving.tenants.database import iso, parse_time
    from tunewright.serving.tenants.usage import UsageLine, lines_csv

    if csv and run.as_json:
        raise UserError("--csv and --json are mutually exclusive", where="--csv", fix="Choose one.")
    if csv and by_day:
        raise UserError("--csv and --by-day are mutually exclusive", where="--csv", fix="Choose one.")
    begins = None if since is None else parse_time(since, "--since")
    with run.project.state() as state:
        if csv:
            pruned = state.usage.rolled_up_until()
            if pruned is not None and (begins is None or begins < pruned):
                day = str(iso(pruned))[:10]
                run.reporter.warn(f"Requests before {day} were pruned: `tunewright tenant usage` has their sums.")
            run.print_out(lines_csv(UsageLine, state.usage.lines(name, begins)))
        elif by_day:
            days = state.usage.by_day(name, begins)
            run.show({"days": days}, days_table(days) if days else "No requests yet.")
        else:
            sums = state.usage.sums(name, begins)
            run.show({"usage": sums}, usage_table(sums) if sums else "No requests yet.")


@command(tenant_app, "feedback", example="tunewright tenant feedback acme --alias legal", status=False, database=True)
def tenant_feedback(
    run: Session,
    name: AnyName = None,
    alias: Annotated[str | None, typer.Option(help="Count only answers of this alias.", show_default="all")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print the feedback on every answer as CSV on stdout.")] = False,
) -> None:
    """Show tenants' feedback on answers by alias and adapter: thumbs, scores and corrections."""
    from tunewright.serving.tenants.blocks import feedback_table
    from tunewright.serving.tenants.feedback import FeedbackLine, feedback_sums
    from tunewright.serving.tenants.usage import lines_csv

    if csv and run.as_json:
        raise UserError("--csv and --json are mutually exclusive", where="--csv", fix="Choose one.")
    with run.project.state() as state:
        lines = state.feedback.lines(name, alias)
    if csv:
        run.print_out(lines_csv(FeedbackLine, lines))
    else:
        sums = feedback_sums(lines)
        run.show({"feedback": sums, "lines": lines}, feedback_table(sums) if sums else "No feedback yet.")


@command(
    tenant_app,
    "record",
    example="tunewright tenant record acme --contract DPA-2026-17 --days 30",
    status=False,
    database=True,
    options=RecordOptions,
)
def tenant_record(
    run: Session,
    name: Name,
    options: RecordOptions = RecordOptions(),
    stop: Annotated[bool, typer.Option("--stop", help="Record no further request; the records stay.")] = False,
) -> None:
    """Record a tenant's requests and answers from its next request on, encrypted and without personal data."""
    from tunewright.serving.tenants.blocks import recordings_table
    from tunewright.serving.tenants.record_keys import KeyFile

    folder = run.project.folder
    if stop:
        refuse_unused("--stop", dict.fromkeys(given_options(options), True))
        with run.project.state() as state:
            found = state.records.stop(name)
        run.show(
            found, f"{name} is not recorded any more. `tunewright tenant forget {name} --all` deletes the records."
        )
        return
    if options.contract is None:
        fix = "Name the contract that permits to record this tenant's requests: --contract DPA-2026-17."
        raise UserError("Recording needs the reference of a contract", where="--contract", fix=fix)
    with run.project.state() as state:
        share = 1.0 if options.share is None else options.share
        found = state.records.start(name, options.contract, options.days, share, KeyFile(folder.record_key))
    if not folder.config.gateway.record:
        run.reporter.warn("Nothing is recorded yet: set gateway.record to true in the config, and restart the server.")
    key = f"The key is in {folder.record_key}. Without it, the records cannot be read: keep a copy in another place."
    run.show(found, recordings_table([found]), key)


@command(tenant_app, "records", example="tunewright tenant records acme", status=False, database=True)
def tenant_records(
    run: Session,
    name: AnyName = None,
    read: Annotated[
        bool,
        typer.Option("--read", help="Print a tenant's decrypted records as JSON Lines; the audit log says who did."),
    ] = False,
) -> None:
    """Show which tenants are recorded under which contract, and how many requests."""
    from pydantic_core import to_json, to_jsonable_python

    from tunewright.serving.tenants.blocks import recordings_table
    from tunewright.serving.tenants.record_keys import KeyFile

    if read and name is None:
        raise UserError(
            "--read needs a tenant", where="--read", fix="Name it: `tunewright tenant records acme --read`."
        )
    with run.project.state() as state:
        if read and name is not None:
            records = state.records.read(name, KeyFile(run.project.folder.record_key))
            lines = "".join(f"{to_json(record).decode()}\n" for record in records)
            if not records:
                run.reporter.say(f"No request of {name} is recorded.")
            run.show({"records": to_jsonable_python(records)}, alone=lines)
            return
        known = state.records.list(name)
    run.show({"recordings": known}, recordings_table(known) if known else "No requests are recorded.")


@command(tenant_app, "forget", example="tunewright tenant forget acme --user customer-17", status=False, database=True)
def tenant_forget(
    run: Session,
    name: Name,
    user: Annotated[str | None, typer.Option(help="End user, as requests name it: safety_identifier or user.")] = None,
    request: Annotated[str | None, typer.Option(help="Id of a response, such as chatcmpl-….")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All requests of the tenant.")] = False,
) -> None:
    """Delete records, feedback, shadows' answers and the end user's name of requests. Their usage is kept."""
    from tunewright.serving.tenants.record_keys import KeyFile

    if sum((user is not None, request is not None, everything)) != 1:
        fix = "Use --user ID for an end user, --request ID for one request, or --all for all of the tenant's."
        raise UserError("Choose one of --user, --request and --all", where="--user", fix=fix)
    for where, named in (("--user", user), ("--request", request)):
        if named == "":
            raise UserError("The ID is empty", where=where, fix="Use --all for all requests of the tenant.")
    with run.project.state() as state:
        file = KeyFile(run.project.folder.record_key)
        done = state.records.forget(name, file, user=user, response_id=request)
    if not done.scrubbed:
        run.reporter.warn(
            "Other programs were reading the serving state, so its write-ahead log may still contain deleted text: "
            "run the command again."
        )
    deleted = (
        f"Forgot {count_of(done.requests, 'request')}: deleted {count_of(done.records, 'record')}, feedback on "
        f"{count_of(done.feedback, 'answer')} and {count_of(done.shadow_answers, 'answer')} of shadows."
    )
    run.show(done, deleted if done.requests else "No such request is stored: nothing was deleted.")


@command(
    tenant_app, "prune-usage", example="tunewright tenant prune-usage --before 2026-11-01", status=False, database=True
)
def tenant_prune_usage(
    run: Session,
    before: Annotated[str, typer.Option(help="Day, such as 2026-11-01: requests of earlier days are pruned.")],
) -> None:
    """Roll old requests up into daily totals and delete the individual records. `tenant usage` stays the same."""
    from tunewright.serving.tenants.database import parse_time

    day = parse_time(before, "--before")
    with run.project.state() as state:
        pruned = state.usage_rollup.roll_up(day)
    text = f"Rolled up {count_of(pruned.requests, 'request')} of {count_of(pruned.days, 'day')}."
    deleted = [
        text
        for count, text in (
            (pruned.shadow_answers, f"{count_of(pruned.shadow_answers, 'answer')} of shadow candidates"),
            (pruned.feedback, f"feedback on {count_of(pruned.feedback, 'answer')}"),
            (pruned.request_records, f"records of {count_of(pruned.request_records, 'request')}"),
        )
        if count
    ]
    if deleted:
        text += f" Deleted with them: {' and '.join(deleted)}."
    run.show(pruned, text)


@command(key_app, "add", example="tunewright tenant key add acme --expires 90d", status=False, database=True)
def key_add(
    run: Session,
    tenant: Name,
    alias: Annotated[
        list[str] | None,
        typer.Option(help="Alias the key may call (repeatable).", show_default="all of the tenant's"),
    ] = None,
    expires: Expires = None,
) -> None:
    """Make a key and print it on stdout, alone. It is shown only once: tunewright stores a hash of it."""
    from tunewright.serving.tenants.database import duration

    lifetime = None if expires is None else duration(expires, "--expires")
    with run.project.state() as state:
        made = state.keys.create(tenant, aliases=alias, lifetime=lifetime)
    _show_key(run, made)


@command(
    key_app, "rotate", example="tunewright tenant key rotate tw_4f1c02a9 --overlap 24h", status=False, database=True
)
def key_rotate(
    run: Session,
    key: Prefix,
    overlap: Annotated[str, typer.Option(help="How long the old key stays valid, such as 24h or 0s.")] = "24h",
    expires: Expires = None,
) -> None:
    """Replace a key by a new one with the same aliases. Both are valid during the overlap."""
    from tunewright.serving.tenants.database import duration

    lifetime = None if expires is None else duration(expires, "--expires")
    both = duration(overlap, "--overlap")
    with run.project.state() as state:
        made = state.keys.rotate(key, overlap=both, lifetime=lifetime)
    _show_key(run, made, f"{key} stays valid for {overlap}.")


def _show_key(run: Session, made: NewKey, *more: str) -> None:
    """Print only the key on stdout, so that a script can read it and no log contains it."""
    run.show(made.as_dict(), new_key_text(made), *more, alone=f"{made.secret}\n")


@command(key_app, "revoke", example="tunewright tenant key revoke tw_4f1c02a9", status=False, database=True)
def key_revoke(run: Session, key: Prefix) -> None:
    """Revoke a key from the next request on. An answer in progress is finished."""
    with run.project.state() as state:
        revoked = state.keys.revoke(key)
    run.show(revoked.as_dict(), f"{revoked.prefix} of {revoked.tenant} is revoked.")


@command(key_app, "list", example="tunewright tenant key list acme", status=False, database=True)
def key_list(run: Session, tenant: AnyName = None) -> None:
    """List keys by prefix: tenant, aliases, expiry and last use."""
    from tunewright.serving.tenants.blocks import keys_table

    with run.project.state() as state:
        known = state.keys.list(tenant)
    run.show({"keys": [key.as_dict() for key in known]}, keys_table(known) if known else "No keys.")


def _tenants(*tenants: Tenant) -> blocks.Table:
    from tunewright.serving.tenants.blocks import tenants_table

    return tenants_table(tenants)


def new_key_text(made: NewKey) -> str:
    """Return a key's permissions, with the note that it is shown only once."""
    scope = "all aliases of" if made.key.aliases is None else f"{', '.join(made.key.aliases)} of"
    until = f" until {minute(made.key.expires)} (UTC)" if made.key.expires is not None else ""
    return f"Good for {scope} {made.key.tenant}{until}. It is not shown again: only its hash is stored."


audit_app = group("audit", DEPLOY, "Show and verify the record of changes to tenants, keys, limits and releases.")


@command(audit_app, "show", example="tunewright audit show", status=False, database=True)
def audit_show(run: Session) -> None:
    """List every change: who made it, when, and what changed."""
    from tunewright.serving.tenants.blocks import audit_table

    with run.project.state() as state:
        lines = state.audit.lines()
    document = {"lines": lines}
    run.show(document, audit_table(lines) if lines else "Nothing has been changed yet.")


@command(audit_app, "verify", example="tunewright audit verify", status=False, database=True)
def audit_verify(
    run: Session,
    noted: Annotated[
        str | None, typer.Option(help="Digest of a line, noted elsewhere, that must still be in the record.")
    ] = None,
) -> int | None:
    """Check the record, what follows from it, the usage and SQLite's file. Exit code 1 if something was changed."""
    with run.project.state() as state:
        check = state.verify(noted)
    whole = f"{check.lines} lines, all as written. Digest of the last one, to note elsewhere: {check.head}"
    if not check.lines:
        whole = "Nothing has been changed yet: there is no line."
    run.show(check.as_dict(), "\n".join(check.faults) if check.faults else whole)
    return FAILED if check.faults else None
