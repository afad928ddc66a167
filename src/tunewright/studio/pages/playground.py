"""The playground: one question to the base, the best prompting arm and adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.responses import Response

from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_text
from tunewright.data.versions import current_manifest
from tunewright.serving.playground_answers import (
    ALIAS,
    BASE,
    PROMPTING,
    PlaygroundAnswer,
    conversation,
    shared_system,
)
from tunewright.studio.jobs import Served, served
from tunewright.studio.pages.data import UPLOADS
from tunewright.studio.pages.deploy import follows_releases, needs_keys, newest_releases
from tunewright.studio.pages.evaluate import evaluations_of
from tunewright.studio.playing import AskedQuestion
from tunewright.studio.visit import Handlers, Visit, in_form, path_of

if TYPE_CHECKING:
    from tunewright.studio.live_answers import TenantServer

_HOTTEST = 2  # as in the server's API
_ADAPTERS = 20  # newest ones on the page
_THUMBS = ("up", "down")
_NAMES = {BASE: "The base, zero-shot", PROMPTING: "The best prompting arm"}


def playground_page(visit: Visit) -> Response:
    """Show the form of a question, or the state of the base."""
    playing = visit.cache.playing
    config = visit.project.folder.config
    adapters = list_adapters(visit.project.folder.adapters)[::-1]
    aliases = {f"{ALIAS}{name}": name for name in _live_aliases(visit)}
    again = playing.question(visit.query["again"]) if "again" in visit.query else None
    if visit.form:
        ticked = {name.removeprefix("model ") for name in visit.form if name.startswith("model ")}
        text, limit, heat = (visit.form.get(name, "") for name in ("question", "limit", "temperature"))
    elif again:
        ticked, text, limit, heat = set(again.models), again.text, str(again.limit or ""), f"{again.temperature:g}"
    else:
        first = {BASE, PROMPTING, _first_ticked(visit, adapters)}
        ticked, text, limit, heat = first if playing.state == "ready" else set(aliases), "", "", "0"
    page = visit.page(
        "playground.html.j2",
        "Playground",
        state=playing.state,
        error=playing.error,
        outdated=playing.is_outdated(config),
        base=config.base_model,
        fixed=_NAMES,
        adapters=adapters[:_ADAPTERS],
        older=len(adapters[_ADAPTERS:]),
        aliases=aliases,
        has_key=bool(visit.session.tenant_key),
        ticked=ticked,
        question=text,
        limit=limit,
        temperature=heat,
        running=visit.jobs.running(),
    )
    if playing.state == "loading":
        page.headers["Refresh"] = "2"
    return page


def _first_ticked(visit: Visit, adapters: Sequence[Adapter]) -> str:
    """Return the adapter that is live, else the newest one whose verdict is ship, else the newest one."""
    live = [each.adapter for each in newest_releases(visit.project) if not each.undeployed]
    digests = [
        each.evidence.lineage.get("adapter", {}).get("digest")
        for each in evaluations_of(visit.project)
        if each.on_test and each.verdict == "ship" and each.evidence is not None
    ]
    ships = [adapter.name for adapter in adapters if adapter.digest in digests]
    return next(iter([*live, *ships, *(adapter.name for adapter in adapters)]), "")


def _server(visit: Visit) -> Served | None:
    """Return the studio's server if it answers for aliases."""
    server = visit.jobs.server()
    running = None if server is None else served(server)
    return running if running and needs_keys(visit) and follows_releases(visit, running) else None


def _live_aliases(visit: Visit) -> list[str]:
    """Return the aliases that can be asked now. A server's own list is as old as its start."""
    live = [each.alias for each in newest_releases(visit.project) if not each.undeployed]
    return live if _server(visit) else []


def load(visit: Visit) -> Response:
    """Load the base, in a thread of its own."""
    visit.cache.playing.load()
    return visit.go("/playground")


def unload(visit: Visit) -> Response:
    """Free the base's memory."""
    visit.cache.playing.unload()
    return visit.go("/playground", "The base is not in memory any more.")


def ask(visit: Visit) -> Response:
    """Take a question; its page starts the answers."""
    text, limit = visit.form.get("question", ""), visit.form.get("limit", "").strip()
    if not text.strip():
        raise UserError("The input is empty", where="question", fix="Type one.")
    if limit and not (limit.isascii() and limit.isdigit() and 0 < int(limit) < 10**6):
        raise UserError(
            f"Invalid number of tokens {limit!r}", where="limit", fix="Use a number above 0, or leave it empty."
        )
    names = [BASE, PROMPTING, *(each.name for each in list_adapters(visit.project.folder.adapters)[::-1])]
    names += [f"{ALIAS}{name}" for name in _live_aliases(visit)]
    before = visit.cache.playing.question(visit.form["after"]) if "after" in visit.form else None
    models = before.models if before else tuple(name for name in names if f"model {name}" in visit.form)
    if not models:
        raise UserError("No model is chosen", fix="Choose who answers.")
    if visit.cache.playing.playground is None and not all(model.startswith(ALIAS) for model in models):
        raise UserError("The base is not loaded", fix="Load it on the page Playground.")
    version = visit.version if current_manifest(visit.project.folder.dataset) is not None else None
    asks_server = any(model.startswith(ALIAS) for model in models)
    question = AskedQuestion(
        text,
        models,
        version,
        int(limit) if limit else None,
        _temperature(visit),
        before,
        _tenant_server(visit) if asks_server else None,
    )
    return visit.go(path_of("playground", visit.cache.playing.ask(question)))


def _tenant_server(visit: Visit) -> TenantServer:
    """Return the server with the key that was typed, or with the session's."""
    from tunewright.studio.live_answers import TenantServer

    running = _server(visit)
    if running is None:
        raise UserError("The server does not run any more", fix="Start it on the page Deploy.")
    key = visit.form.get("api_key", "").strip() or visit.session.tenant_key
    if not (key and key.isascii() and key.isprintable()):
        what = "This is not an API key" if key else "A live alias needs a tenant's API key"
        raise UserError(what, where="api_key", fix="Make one on the page Tenants, and paste it.")
    visit.session.tenant_key = key
    return TenantServer(running.url, key)


def _temperature(visit: Visit) -> float:
    typed = visit.form.get("temperature", "").strip() or "0"
    with suppress(ValueError):
        if 0 <= float(typed) <= _HOTTEST:
            return float(typed)
    what = f"Invalid temperature {typed!r}"
    raise UserError(what, where="temperature", fix=f"Use a number from 0 to {_HOTTEST}.")


def question_page(visit: Visit) -> Response:
    """Show a question with the answers so far; the script shows them as they are computed."""
    question = visit.cache.playing.question(visit.place["question"])
    aliases = {each: f"The live alias {each.removeprefix(ALIAS)}" for each in question.models if each.startswith(ALIAS)}
    columns = [(model, question.answers.get(model)) for model in question.models]
    return visit.page(
        "question.html.j2",
        "Input",
        id=visit.place["question"],
        question=question,
        names=_NAMES | aliases,
        columns=[(model, None if isinstance(found, UserError) else found, found) for model, found in columns],
        percent=lambda logprob: f"{100 * math.exp(logprob):.3g}%",
    )


def give_feedback(visit: Visit) -> Response:
    """Send a thumb on a live alias's answer, with a correction and a reason, to the server that gave it."""
    question, model = visit.cache.playing.question(visit.place["question"]), visit.form.get("model", "")
    answer = question.answers.get(model)
    if not isinstance(answer, PlaygroundAnswer) or answer.response_id is None or question.server is None:
        raise UserError("There is no such answer of a live alias", fix="Go back and choose one.")
    visit.chosen("thumb", _THUMBS)
    opinion = {name: text for name in ("thumb", "correction", "reason") if (text := visit.form.get(name, "").strip())}
    question.server.give_feedback(answer.response_id, opinion)
    question.feedback[model] = opinion
    said = f"Recorded thumb {opinion['thumb']} on the answer of {answer.asked}."
    return visit.go(path_of("playground", visit.place["question"]), said)


def row_page(visit: Visit) -> Response:
    """Show the editor of a new row, with the question and an answer."""
    question = visit.cache.playing.question(visit.place["question"])
    answer = question.answers.get(visit.query.get("model", ""))
    if not isinstance(answer, PlaygroundAnswer):
        raise UserError("There is no such answer", fix="Go back and choose one.")
    return visit.page(
        "new_row.html.j2",
        "New row",
        id=visit.place["question"],
        question=question,
        model=visit.query["model"],
        answer=answer,
    )


def write_row(visit: Visit) -> Response:
    """Write a row into a file of its own, and show what adding it would do: the same page as for any file."""
    question = visit.cache.playing.question(visit.place["question"])
    given = question.answers.get(visit.form.get("model", ""))
    if not isinstance(given, PlaygroundAnswer):
        raise UserError("There is no such answer", fix="Go back and choose one.")
    text, answer = visit.form.get("question", ""), visit.form.get("answer", "")
    if not (text.strip() and answer.strip()):
        raise UserError("The input or the answer is empty", fix="Go back and type it.")
    earlier = question.earlier(visit.form["model"])
    turns = [message.as_dict() for message in conversation(text, shared_system(question.version), earlier)]
    origin = {
        "from": "playground",
        "answered_by": given.asked,
        "adapter": given.digest,
        "edited": (text, answer) != (question.text, given.text),
        "by": visit.session.reviewer,
    }
    row = {"messages": [*turns, {"role": "assistant", "content": answer}], "origin": origin}
    name = f"playground-{digest(row)[:12]}.jsonl"
    write_text(visit.project.folder.root / UPLOADS / name, json.dumps(row, ensure_ascii=False) + "\n")
    return visit.go(f"/data/check?file={name}")


HANDLERS: Handlers = {
    ("GET", "/playground"): playground_page,
    ("POST", "/playground"): in_form("/playground", playground_page, ask),
    ("POST", "/playground/load"): load,
    ("POST", "/playground/unload"): unload,
    ("GET", "/playground/{question}"): question_page,
    ("POST", "/playground/{question}/feedback"): in_form("/playground/{question}", question_page, give_feedback),
    ("GET", "/playground/{question}/row"): row_page,
    ("POST", "/playground/{question}/row"): write_row,
}
