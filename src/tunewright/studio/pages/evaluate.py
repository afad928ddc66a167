"""Starting an evaluation or the whole pipeline: its choices, and the answers that each has to compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.responses import Response

from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.core.errors import UserError
from tunewright.core.text import count_of
from tunewright.data.versions import current_manifest
from tunewright.studio.visit import Handlers, Visit, path_of

if TYPE_CHECKING:
    from tunewright.evaluation.workload import AnswersEstimate

EVALUATE_PAGE = "/evaluate"


@dataclass(frozen=True)
class _Choice:
    """An evaluation on one split: its answers, or the reason why they are unknown."""

    split: str
    estimate: AnswersEstimate | None
    unknown: str = ""


def evaluate_page(visit: Visit) -> Response:
    """Show how many answers an evaluation has to compute, and start it with the choices of the command line."""
    folder = visit.project.folder
    manifest = current_manifest(folder.dataset)
    adapters = [a for a in list_adapters(folder.adapters) if manifest and a.dataset in (None, manifest.digest)]
    chosen = _adapter(adapters, visit.query.get("adapter"))
    choices = [] if chosen is None else [_choice(visit, chosen, dev=dev) for dev in (False, True)]
    return visit.page(
        "evaluate.html.j2",
        "Evaluate",
        adapters=adapters[::-1],
        chosen=chosen,
        choices=choices,
        first=choices[0] if choices else None,
        items=_items(visit) if manifest else "",
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


def _choice(visit: Visit, adapter: Adapter, *, dev: bool) -> _Choice:
    split = "dev" if dev else "test"
    try:
        return _Choice(split, _estimate(visit, adapter, dev=dev))
    except UserError as error:
        return _Choice(split, None, str(error))


def _estimate(visit: Visit, adapter: Adapter, *, dev: bool) -> AnswersEstimate:
    """Return the estimate, again only if a file that decides it has changed: prompts of all arms take seconds."""
    folder, kept = visit.project.folder, visit.cache.estimates
    files = [
        folder.root / "tunewright.yaml",
        *sorted(folder.work.glob("generations/*")),
        *sorted(folder.evaluations.glob("*.json*")),
        *sorted(folder.evaluations.glob("[!.]*/evidence.json")),
    ]
    stamps = tuple((file, file.stat().st_mtime_ns) for file in files)
    manifest = current_manifest(folder.dataset)
    deciding = (stamps, None if manifest is None else manifest.digest)
    key = (adapter.digest, dev)
    if key not in kept or kept[key][0] != deciding:
        found = visit.project.estimate_evaluation(adapter.name, dev=dev, embed=False)
        kept[key] = (deciding, found)
    return kept[key][1]


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
    form, action = visit.form, visit.form.get("action", "")
    if action == "run":
        return visit.go(path_of("jobs", visit.jobs.start("run").id))
    adapter = form.get("adapter", "")
    known = {each.name for each in list_adapters(visit.project.folder.adapters)}
    if adapter not in known:
        raise UserError(f"No adapter is named {adapter!r}", fix="Go back and choose one of the list.")
    if action != "evaluate":
        raise UserError(f"The page has no action {action!r}", fix="Use its buttons.")
    words = ["evaluate", adapter, *(["--dev"] if form.get("split") == "dev" else [])]
    if minutes := form.get("minutes", "").strip():
        words += ["--minutes", f"{_minutes(minutes):g}"]
    return visit.go(path_of("jobs", visit.jobs.start(*words).id))


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not (math.isfinite(minutes) and minutes > 0):
        raise UserError(f"The minutes must be a number above 0 (got {text!r})", fix="Go back and change them.")
    return minutes


HANDLERS: Handlers = {
    ("GET", EVALUATE_PAGE): evaluate_page,
    ("POST", EVALUATE_PAGE): start_evaluation,
}
