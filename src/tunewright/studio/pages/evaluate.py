"""Evaluations: starting one, its verdict and contrasts, its report, and each item with all answers and prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from starlette.responses import HTMLResponse, Response

from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.api import Project
from tunewright.config import metric_name
from tunewright.core.errors import UserError
from tunewright.core.numbers import read_numbers
from tunewright.core.text import count_of
from tunewright.data.review.label_models import excerpt
from tunewright.data.trace import find_row
from tunewright.data.versions import Member, current_manifest
from tunewright.evaluation.stored import item_prompts
from tunewright.evidence.blocks import evaluation_sections
from tunewright.evidence.files import CHANGES, DEV_PREFIX, EVIDENCE_FILE, ItemFilter, chosen_items, load_evidence
from tunewright.evidence.schema import Evidence, Item
from tunewright.metrics import metric_label
from tunewright.render.blocks import Cell, Table, table, words
from tunewright.report.items import shown_answer
from tunewright.studio.computed import Part, evaluation_estimates
from tunewright.studio.visit import Handlers, Visit, in_form, path_of, positive_numbers, stamps

_NEWEST = 10  # evaluations on the project's page


@dataclass(frozen=True)
class ListedEvaluation:
    """An evaluation on the project's page; the verdict of damaged evidence is ``unreadable``."""

    id: str
    verdict: str
    reason: str
    on_test: bool
    measured: str = ""
    """The measurement with its test; empty where the evidence is damaged."""
    next_step: str = ""
    """The verdict's next step, if it has one."""
    evidence: Evidence | None = None
    number: int | None = None
    """None for an evaluation of an earlier release."""
    adapter: str = ""
    """The evaluated adapter's name, or the start of its digest if it is not here any more."""


def evaluations_of(project: Project, most: int = _NEWEST) -> list[ListedEvaluation]:
    """Return the newest evaluations with their verdicts; damaged evidence is named."""
    files = sorted(
        project.folder.evaluations.glob(f"[!.]*/{EVIDENCE_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True
    )
    found, numbers = [], read_numbers(project.folder.evaluations)
    adapters = {each.digest: each.name for each in list_adapters(project.folder.adapters)}
    for file in files[:most]:
        name = file.parent.name
        try:
            verdict = project.verdict(file.parent)
        except UserError as error:
            found.append(ListedEvaluation(name, "unreadable", str(error), on_test=False))
        else:
            on_test = not name.startswith(DEV_PREFIX)
            against = [f"Incumbent {each.incumbent.name}: {each.outcome}." for each in verdict.replacements]
            reason = " ".join([verdict.summary, *against])
            listed = ListedEvaluation(name, verdict.decision, reason, on_test, verdict.reasons[0], verdict.next_step)
            evidence = load_evidence(file)
            digest = str(evidence.lineage.get("adapter", {}).get("digest", ""))
            adapter = adapters.get(digest, digest[:12])
            found.append(replace(listed, evidence=evidence, number=numbers.get(name), adapter=adapter))
    return found


EVALUATE_PAGE = "/evaluate"


def evaluate_page(visit: Visit) -> Response:
    """Show how many answers an evaluation has to compute, and start it with the choices of the command line."""
    folder = visit.project.folder
    manifest = current_manifest(folder.dataset)
    adapters = [a for a in list_adapters(folder.adapters) if manifest and a.dataset in (None, manifest.digest)]
    chosen = _adapter(adapters, visit.query.get("adapter"))
    return visit.page(
        "evaluate.html.j2",
        "Evaluate",
        adapters=adapters[::-1],
        chosen=chosen,
        estimates=None if chosen is None else _estimates(visit, chosen),
        items=_items(visit) if manifest else "",
        metric=metric_label(metric_name(folder.config.evaluate.metric)),
        settings=folder.config.evaluate,
        runs=bool(folder.config.data.sources),
        hosted=[each.name for each in folder.config.evaluate.incumbents],
        running=visit.jobs.running(),
    )


def _adapter(adapters: list[Adapter], name: str | None) -> Adapter | None:
    """Return the adapter of this name, or the newest one that was trained here, as the command line does."""
    if name is not None:
        found = next((each for each in adapters if each.name == name), None)
        if found is None:
            raise UserError(f"No adapter of the current version is named {name!r}", fix="Choose one of the list.")
        return found
    trained = [each for each in adapters if each.imported is None] or adapters
    return trained[-1] if trained else None


def _estimates(visit: Visit, adapter: Adapter) -> Part:
    """Return each split's estimate, computed again only if a file that decides it has changed: prompts take seconds."""
    folder = visit.project.folder
    files = [
        *sorted(folder.work.glob("generations/*")),
        *sorted(folder.evaluations.glob("*.json*")),
        *sorted(folder.evaluations.glob("[!.]*/evidence.json")),
    ]
    return visit.computed(evaluation_estimates, adapter.name, deciding=[adapter.digest, *stamps(files)])


def _items(visit: Visit) -> str:
    """Return what decides the time of an evaluation without an adapter: arms and rows."""
    from tunewright.evaluation.arms import prompting_arms

    settings = visit.project.folder.config.evaluate
    dev, test = (len(visit.version.examples(split)) for split in ("dev", "test"))
    screened = min(settings.screening_items or dev, dev)
    return (
        f"{count_of(len(prompting_arms(settings)), 'prompting arm')} answer {count_of(screened, 'dev row')}, then at "
        f"least 3 arms answer {count_of(test, 'test row')}."
    )


def start_evaluation(visit: Visit) -> Response:
    """Start an evaluation or the whole pipeline."""
    form = visit.form
    if visit.chosen("action", ("run", "evaluate")) == "run":
        return visit.start("run")
    adapter = visit.chosen("adapter", {each.name for each in list_adapters(visit.project.folder.adapters)})
    words = ["evaluate", adapter, *(["--dev"] if form.get("split") == "dev" else [])]
    words += [word for minutes in positive_numbers(form, "minutes") for word in ("--minutes", minutes)]
    return visit.start(*words)


_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
_MOST = 100  # evaluations on the list
_ON_A_PAGE = 50  # items


@dataclass(frozen=True)
class _Choice:
    """The filter of a page, and the fields of its form."""

    kept: ItemFilter
    fields: dict[str, str]

    @property
    def query(self) -> str:
        """The fields as a query."""
        return urlencode({name: value for name, value in self.fields.items() if value})


def evidence_list(visit: Visit) -> Response:
    """Show all evaluations with their verdicts."""
    return visit.page("evidence_list.html.j2", "Evidence", evaluations=evaluations_of(visit.project, _MOST))


def evidence_page(visit: Visit) -> Response:
    """Show an evaluation's verdict and measurements, and the items that a filter keeps."""
    name = visit.place["evaluation"]
    evidence, items = visit.project.evidence(name)
    choice = _choice(visit, evidence)
    chosen = chosen_items(evidence, items, choice.kept)
    shown, numbers = visit.shown(chosen, _ON_A_PAGE)
    verdict = visit.project.verdict(name)
    return visit.page(
        "evidence.html.j2",
        visit.evaluation_name(name),
        id=name,
        evidence=evidence,
        verdict=verdict,
        sections=evaluation_sections(evidence),
        choice=choice,
        changes=CHANGES,
        bands=_bands(evidence),
        chosen=_items_table(name, shown, choice),
        **numbers,
    )


def _items_table(name: str, chosen: Sequence[tuple[int, Item, str]], choice: _Choice) -> Table:
    arms = (choice.kept.treatment, choice.kept.control)
    rows: list[tuple[str | Cell, ...]] = []
    for number, item, change in chosen:
        link = f"{path_of('evidence', name, str(number))}?{choice.query}"
        nearest = "" if item.nearest is None else f"{item.nearest:.2f}"
        rows.append((Cell(str(number), link=link), change, *item_texts(item, arms), nearest))
    return table("Items", (*words("Item", "Effect", "Input", "Reference", *arms), "Similarity"), rows)


def item_texts(item: Item, arms: Sequence[str]) -> list[str]:
    """Return the beginnings of an item's input, its reference, and each arm's answer."""
    answers = (excerpt(item.answers[arm]) if arm in item.answers else "no answer" for arm in arms)
    return [excerpt(item.input), excerpt(item.reference), *answers]


def _choice(visit: Visit, evidence: Evidence) -> _Choice:
    """Return the filter of the query."""
    first = ItemFilter.of(evidence.contrasts[0])
    query = visit.query
    fields = {
        "treatment": query.get("treatment") or first.treatment,
        "control": query.get("control") or first.control,
        "change": query.get("change", ""),
        "nearest": query.get("nearest", ""),
    }
    change = next((each for each in CHANGES if each == fields["change"]), None)
    bands = dict(_bands(evidence))
    if (change is None and fields["change"]) or (fields["nearest"] and fields["nearest"] not in bands):
        raise UserError("The page has no such filter", where=evidence.id, fix="Choose one of the lists.")
    limits = bands.get(fields["nearest"])
    return _Choice(ItemFilter(fields["treatment"], fields["control"], change, limits), fields)


def _bands(evidence: Evidence) -> list[tuple[str, tuple[float, float]]]:
    """Return the bands of similarity to the training rows that have items."""
    found = evidence.train_similarity
    return [] if found is None else [(f"{b.low:.1f} to {b.high:.1f}", (b.low, b.high)) for b in found.bands]


def item_page(visit: Visit) -> Response:
    """Show one item: input, references, and every arm's answer with its scores."""
    evidence, items = visit.project.evidence(visit.place["evaluation"])
    number, item = _item(visit, items)
    choice = _choice(visit, evidence)
    compared = evidence.incumbents.compared if evidence.incumbents else ()
    numbers = [each for each, _, _ in chosen_items(evidence, items, choice.kept)]
    return visit.page(
        "item.html.j2",
        f"Item {number} of {len(items)}",
        id=visit.place["evaluation"],
        evidence=evidence,
        item=item,
        row=_row_of(visit, item),
        number=number,
        choice=choice,
        before=max((each for each in numbers if each < number), default=None),
        after=min((each for each in numbers if each > number), default=None),
        answers=[(shown_answer(item, arm, evidence.metric), _scores(item, arm)) for arm in item.answers],
        versions={f"incumbent-{each.name}": ", ".join(each.versions) for each in compared},
    )


def _row_of(visit: Visit, item: Item) -> Member | None:
    """Return the current version's row that the item measured on, also if it was edited since; None if it is gone."""
    with suppress(UserError):  # no row has the number, or there is no version
        number = visit.rows.numbers.get(item.key)
        return None if number is None else find_row(visit.project.folder.dataset, visit.version, str(number))
    return None


def _item(visit: Visit, items: list[Item]) -> tuple[int, Item]:
    number = visit.place["number"]
    if not number.isdecimal() or not 1 <= int(number) <= len(items):
        raise UserError(f"There is no item {number!r}", fix=f"Choose a number from 1 to {len(items)}.")
    return int(number), items[int(number) - 1]


def _scores(item: Item, arm: str) -> list[tuple[str, str]]:
    """Return each metric's label with the arm's score, or the reason why there is no score."""
    found = []
    for metric, scores in item.scores.items():
        why = (item.unscored or {}).get(metric, {}).get(arm, "")
        text = f"{scores[arm]:g}" if arm in scores else f"not scored{f': {why}' if why else ''}"
        found.append((metric_label(metric), text))
    return found


def prompts_page(visit: Visit) -> Response:
    """Show each arm's stored prompt for an item as tokens, and the demonstrations in it."""
    _, items = visit.project.evidence(visit.place["evaluation"])
    number, item = _item(visit, items)
    place = visit.project.evaluation(visit.place["evaluation"])
    return visit.page(
        "prompts.html.j2",
        f"Prompts of item {number}",
        id=visit.place["evaluation"],
        number=number,
        back=path_of("evidence", visit.place["evaluation"], str(number)),
        prompts=visit.computed(item_prompts, place.name, item.key, deciding=stamps(sorted(place.glob("*.json*")))),
        excerpt=excerpt,
        turn_text=_turn_text,
    )


def _turn_text(turn: Mapping[str, Any]) -> str:
    """Return the text of a turn, or JSON if a turn has more than a text."""
    alone = turn.keys() == {"role", "content"}
    return str(turn["content"]) if alone else json.dumps(turn, ensure_ascii=False, indent=1)


def report_page(visit: Visit) -> Response:
    """Show an evaluation's report, which is a page of its own with its styles inside, below links to the studio."""
    name = visit.place["evaluation"]
    text = visit.project.report(name).read_text(encoding="utf-8")
    links = visit.templates.get_template("report_links.html.j2").render(id=name)
    # The file itself has no external links.
    text = text.replace("<body>", f"<body>\n{links}", 1)
    return HTMLResponse(text, headers={"Content-Security-Policy": _REPORT_POLICY})


HANDLERS: Handlers = {
    ("GET", EVALUATE_PAGE): evaluate_page,
    ("POST", EVALUATE_PAGE): in_form(EVALUATE_PAGE, evaluate_page, start_evaluation),
    ("GET", "/evidence"): evidence_list,
    ("GET", "/evidence/{evaluation}"): evidence_page,
    ("GET", "/evidence/{evaluation}/{number}"): item_page,
    ("GET", "/evidence/{evaluation}/{number}/prompts"): prompts_page,
    ("GET", "/report/{evaluation}"): report_page,
}
