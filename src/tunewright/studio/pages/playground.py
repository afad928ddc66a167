"""The playground: one question to the base, the best prompting arm and adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress

from starlette.responses import Response

from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_text
from tunewright.data.versions import current_manifest
from tunewright.serving.playground_answers import BASE, PROMPTING, PlaygroundAnswer, conversation, shared_system
from tunewright.studio.pages.data import UPLOADS
from tunewright.studio.pages.deploy import newest_releases
from tunewright.studio.pages.evaluate import evaluations_of
from tunewright.studio.playing import AskedQuestion
from tunewright.studio.visit import Handlers, Visit, in_form, path_of

_HOTTEST = 2  # as in the server's API
_ADAPTERS = 20  # newest ones on the page
_NAMES = {BASE: "The base, zero-shot", PROMPTING: "The best prompting arm"}


def playground_page(visit: Visit) -> Response:
    """Show the form of a question, or the state of the base."""
    playing = visit.cache.playing
    config = visit.project.folder.config
    adapters = list_adapters(visit.project.folder.adapters)[::-1]
    again = playing.question(visit.query["again"]) if "again" in visit.query else None
    if visit.form:
        ticked = {name.removeprefix("model ") for name in visit.form if name.startswith("model ")}
        text, limit, heat = (visit.form.get(name, "") for name in ("question", "limit", "temperature"))
    elif again:
        ticked, text, limit, heat = set(again.models), again.text, str(again.limit or ""), f"{again.temperature:g}"
    else:
        ticked, text, limit, heat = {BASE, PROMPTING, _first_ticked(visit, adapters)}, "", "", "0"
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
    if visit.cache.playing.playground is None:
        raise UserError("The base is not loaded", fix="Load it on the page Playground.")
    names = [BASE, PROMPTING, *(each.name for each in list_adapters(visit.project.folder.adapters)[::-1])]
    before = visit.cache.playing.question(visit.form["after"]) if "after" in visit.form else None
    models = before.models if before else tuple(name for name in names if f"model {name}" in visit.form)
    if not models:
        raise UserError("No model is chosen", fix="Choose the base or an adapter.")
    version = visit.version if current_manifest(visit.project.folder.dataset) is not None else None
    question = AskedQuestion(text, models, version, int(limit) if limit else None, _temperature(visit), before)
    return visit.go(path_of("playground", visit.cache.playing.ask(question)))


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
    columns = [(model, question.answers.get(model)) for model in question.models]
    return visit.page(
        "question.html.j2",
        "Input",
        id=visit.place["question"],
        question=question,
        names=_NAMES,
        columns=[(model, None if isinstance(found, UserError) else found, found) for model, found in columns],
        percent=lambda logprob: f"{100 * math.exp(logprob):.3g}%",
    )


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
    ("GET", "/playground/{question}/row"): row_page,
    ("POST", "/playground/{question}/row"): write_row,
}
