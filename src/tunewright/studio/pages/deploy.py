"""Aliases, their releases, the server, and the audit log."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.responses import Response

from tunewright.adapters.registry import list_adapters
from tunewright.api import Project
from tunewright.core.clock import minute
from tunewright.core.errors import UserError
from tunewright.core.text import capitalised
from tunewright.render.blocks import Cell, Column, Table, table, words
from tunewright.serving.gateway.server import require_free
from tunewright.serving.serve import has_state
from tunewright.studio.jobs import RELEASES, SERVER, EngineState, Job, Served, engines, outcome, served
from tunewright.studio.visit import Handlers, Visit, in_form, path_of

if TYPE_CHECKING:
    from tunewright.serving.tenants.audit import AuditLine
    from tunewright.serving.tenants.releases import Release

_ADAPTERS = 20  # newest ones on the page
_JOBS = 5
_LINES = 100  # lines of the audit log on a page
_TRIALS = ("all", "canary", "shadow")
_MADE = {
    "deploy": "released",
    "canary": "on trial since",
    "shadow": "on trial since",
    "promote": "promoted",
    "rollback": "rolled back",
    "undeploy": "undeployed",
}
_SWITCHES = {"no_system_prompt": "--no-system-prompt", "constrain": "--constrain"}


def deploy_page(visit: Visit) -> Response:
    """Show the aliases, what can be released, and the server."""
    project = visit.project
    adapters = list_adapters(project.folder.adapters)[::-1]
    aliases = newest_releases(project)
    server = visit.jobs.server()
    running = None if server is None else served(server)
    jobs = [job for job in visit.jobs.all() if job.command[0] in RELEASES][:_JOBS]
    releasable, fault = [], None
    try:
        releasable = project.releasable(adapters[:_ADAPTERS])
    except UserError as error:  # evidence was changed: nothing can be released, and the rest of the page is needed
        fault = error
    return visit.page(
        "deploy.html.j2",
        "Deploy",
        aliases=aliases,
        aliases_table=_aliases_table(aliases),
        suggested=aliases[0].alias if len(aliases) == 1 else "" if aliases else _alias_of(project.folder.config.name),
        adapters=releasable,
        fault=fault,
        older=len(adapters[_ADAPTERS:]),
        constrains=project.folder.config.evaluate.structured_outputs is not None,
        running=visit.jobs.running(),
        jobs=_jobs_table(jobs),
        server=server,
        served=running,
        keys=needs_keys(visit),
        follows=follows_releases(visit, running),
        serve=project.folder.config.serve,
        made=made,
        engines_table=_engines_table(engines(running)) if running else None,
    )


def _aliases_table(aliases: Sequence[Release]) -> Table:
    rows = []
    for each in aliases:
        verdict = (each.grounds.verdict or "not evaluated") + ("" if each.grounds.because is None else ", forced")
        live = ("nothing: undeployed", "", "") if each.undeployed else (each.adapter, each.digest[:12], verdict)
        trial = f"{each.candidate.adapter} {each.candidate.summary}" if each.candidate else ""
        rows.append((each.alias, *live, trial, capitalised(made(each))))
    alias, digest = Column("Alias", words=True, of="alias"), Column("Digest", words=True, of="digest")
    head = (alias, *words("Answers with"), digest, *words("Verdict", "On trial", "Newest release"))
    return table("Aliases", head, rows)


def _jobs_table(jobs: Sequence[Job]) -> Table:
    head, rows = words("Command", "Alias", "Started (UTC)", "Result"), []
    for job in jobs:
        name, alias, *_ = job.command
        rows.append((Cell(name, link=path_of("jobs", job.id)), alias, job.minute, outcome(job)))
    return table("Releases that were started here", head, rows)


def _engines_table(states: Sequence[EngineState] | None) -> Table | None:
    """Return a server's engines: a table without rows if it has one itself; None if its metrics do not answer."""
    if states is None:
        return None
    rows = []
    for each in states:
        counts = (f"{number:,}" for number in (each.running, each.adapters, each.restarts))
        rows.append((each.url, "up" if each.up else "takes no requests", *counts))
    return table("Engines", (*words("Address", "State"), "Running", "Adapters loaded", "Restarts"), rows)


def made(release: Release) -> str:
    """Return a release's action, its time, and its author if one is recorded."""
    text = f"{_MADE[release.action]} {minute(release.created)} UTC"
    return f"{text} by {release.author}" if release.author else text


def _alias_of(name: str) -> str:
    """Return the project's name as an alias; empty if it cannot be one."""
    from tunewright.serving.tenants.tenants import check_name

    try:
        check_name(name.lower(), "an alias")
    except UserError:
        return ""
    return name.lower()


def newest_releases(project: Project) -> list[Release]:
    """Return the newest release of each alias, by name."""
    if not has_state(project):
        return []
    newest = {release.alias: release for release in project.releases()}
    return [newest[alias] for alias in sorted(newest)]


def require_state(visit: Visit) -> None:
    """Refuse a page about an alias or a tenant before any exists: viewing it must not create a database."""
    if not has_state(visit.project):
        raise UserError("There are no aliases and tenants yet", fix="Start on the pages Deploy and Tenants.")


def needs_keys(visit: Visit) -> bool:
    """Return whether requests to a server need a tenant's key."""
    if not has_state(visit.project):
        return False
    with visit.project.state() as state:
        return state.tenants.any()


def follows_releases(visit: Visit, server: Served | None) -> bool:
    """Return whether a running server answers aliases. One that was started without tenants lists the base instead."""
    return needs_keys(visit) if server is None else visit.project.folder.config.base_model not in server.models


def deploy(visit: Visit) -> Response:
    """Start the job that releases an adapter. It makes the checks, and nothing here can skip one."""
    from tunewright.serving.options import percent
    from tunewright.serving.tenants.tenants import check_name

    alias = visit.form.get("alias", "")
    check_name(alias, "an alias")
    adapter = visit.chosen("adapter", {each.name for each in list_adapters(visit.project.folder.adapters)})
    trial = visit.chosen("trial", _TRIALS)
    live = next((each for each in newest_releases(visit.project) if each.alias == alias), None)
    if trial != "all":
        if live is None or live.undeployed:
            what = f"No adapter is live on {alias} yet, so there is nothing to compare with"
            raise UserError(what, where="trial", fix="Let this one answer every request first.")
        if live.adapter == adapter:
            fix = "Choose another adapter, or let it answer every request."
            what = f"{adapter} is live on {alias} already, so there is nothing to try"
            raise UserError(what, where="adapter", fix=fix)
    options = [option for name, option in _SWITCHES.items() if name in visit.form]
    if trial == "shadow":
        options.append("--shadow")
    elif trial == "canary":
        share = visit.form.get("share", "").strip()
        percent(share, "share")  # refuses it here, not in the job
        options.append(f"--canary={share}")
    return visit.start("deploy", alias, adapter, *options)


def alias_page(visit: Visit) -> Response:
    """Show an alias: what it answers with, its trial, and its history."""
    from tunewright.serving.tenants.blocks import releases_blocks, shadow_blocks, usage_table

    require_state(visit)
    alias = visit.place["alias"]
    with visit.project.state() as state:
        history, shadows, usage = state.releases.history(alias), state.usage.shadow_lines(alias), state.usage.sums()
        back = None
        with suppress(UserError):  # there is no adapter before the live one
            back = state.releases.rollback_target(alias)
    now = history[-1]
    used = [each for each in usage if each.alias == alias]
    live = None if now.undeployed else now.answer
    # A look settles units of the sequence, which a visitor of a demo must not.
    shadowed = any(each.action == "shadow" for each in history) and not visit.session.read_only
    review = visit.project.shadow.status(alias) if shadowed else None
    here = {(each.name, each.digest) for each in list_adapters(visit.project.folder.adapters)}
    # The newest release of each answer that the alias does not give now, of adapters that are still here.
    earlier = {
        each.answer: each
        for each in history
        if not each.undeployed and each.answer != live and (each.adapter, each.digest) in here
    }
    first = back if back is not None and (back.adapter, back.digest) in here else None
    if first is not None:
        earlier.pop(first.answer, None)
    return visit.page(
        "alias.html.j2",
        f"Alias {alias}",
        now=now,
        live=next((each for each in history[::-1] if each.action not in _TRIALS), now),
        made=made,
        back=first,
        restorable=sorted(earlier.values(), key=lambda each: -each.number),
        running=visit.jobs.running(),
        usage=usage_table(used, now) if used else None,
        shadows=shadow_blocks(shadows) if shadows else (),
        review=review,
        releases=releases_blocks(history[::-1]),
    )


def promote(visit: Visit) -> Response:
    """Start the job that makes a candidate live."""
    return visit.start("promote", _current(visit))


def rollback(visit: Visit) -> Response:
    """Drop a candidate, or restore an earlier release."""
    alias, number = _current(visit), visit.form.get("to", "")
    if number and not (number.isascii() and number.isdigit()):
        raise UserError(f"Invalid release {number!r}", fix="Choose one of the list.")
    made = visit.project.rollback(alias, int(number) if number else None)
    return visit.go(path_of("deploy", alias), f"{alias} answers with {made.adapter} again: release {made.number}.")


def undeploy(visit: Visit) -> Response:
    """Stop answering on an alias."""
    alias = _current(visit)
    if visit.form.get("alias", "").strip() != alias:
        what = "The typed alias is another one. Nothing was done"
        raise UserError(what, where="alias", fix=f"Type {alias} to undeploy it.")
    made = visit.project.undeploy(alias, because=visit.form.get("because", "").strip() or None)
    return visit.go(path_of("deploy", alias), f"{alias} answers nothing from release {made.number} on.")


def _current(visit: Visit) -> str:
    """Return the form's alias, if nothing was released since its page was made."""
    require_state(visit)
    alias = visit.place["alias"]
    newest = visit.project.releases(alias)[-1].number
    if visit.form.get("release") != str(newest):
        raise UserError(
            f"{alias} has changed meanwhile: its newest release is {newest}. Nothing was done",
            fix="Look at it again before you send the form.",
        )
    return alias


def start_server(visit: Visit) -> Response:
    """Start `tunewright serve`, which runs next to other jobs."""
    port = visit.form.get("port", "")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise UserError(f"Invalid port {port!r}", where="port", fix="Use a number from 0 to 65535; 0 is any free port.")
    serve = visit.project.folder.config.serve
    try:
        require_free(serve.host, int(port))
    except UserError as taken:
        raise UserError(taken.what, where="port", fix=taken.fix) from None
    # The page shows engines, from the metrics; only on this machine, because they name all tenants.
    unseen = serve.engines and serve.metrics_port is None
    words = ["--metrics-host=127.0.0.1", "--metrics-port=0"] if unseen else []
    return visit.start(SERVER, f"--port={port}", *words)


def audit_page(visit: Visit) -> Response:
    """Show the changes to tenants, keys, limits and releases, newest first, and check them if asked."""
    from tunewright.serving.tenants.blocks import audit_table

    lines: Sequence[AuditLine] = ()
    check = None
    if has_state(visit.project):
        with visit.project.state() as state:
            lines = state.audit.lines()[::-1]
            check = state.verify() if "verify" in visit.query else None
    shown, numbers = visit.shown(lines, _LINES)
    return visit.page("audit.html.j2", "Audit log", lines=audit_table(shown), **numbers, check=check)


HANDLERS: Handlers = {
    ("GET", "/deploy"): deploy_page,
    ("POST", "/deploy"): in_form("/deploy", deploy_page, deploy),
    ("GET", "/deploy/{alias}"): alias_page,
    ("POST", "/deploy/{alias}/promote"): in_form("/deploy/{alias}", alias_page, promote),
    ("POST", "/deploy/{alias}/rollback"): in_form("/deploy/{alias}", alias_page, rollback),
    ("POST", "/deploy/{alias}/undeploy"): in_form("/deploy/{alias}", alias_page, undeploy),
    ("POST", "/server"): in_form("/deploy", deploy_page, start_server),
    ("GET", "/audit"): audit_page,
}
