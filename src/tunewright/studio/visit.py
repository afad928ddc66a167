"""One request's view of the project, which the pages are made from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

from jinja2 import Environment
from starlette.responses import HTMLResponse, RedirectResponse, Response

from tunewright.annotation import AnnotationSession, ItemT, Leases, VerdictT
from tunewright.api import Project
from tunewright.core.errors import UserError
from tunewright.core.numbers import read_numbers
from tunewright.data.browse import RowIndex
from tunewright.data.review.label_models import NeighborIndex
from tunewright.data.review.reviews import REVIEWS_FILE, ReviewLog, read_reviews
from tunewright.data.review.session import ReviewSession
from tunewright.data.trace import KnownPlaces
from tunewright.data.versions import DatasetVersion, current_manifest, list_versions
from tunewright.evaluation.human_eval.session import BlindReview
from tunewright.evaluation.stored_answers import RowAnswers, evaluated_files
from tunewright.studio.access import Notice, StudioSession
from tunewright.studio.computed import Computed, Function, PageReporter, Part
from tunewright.studio.jobs import Jobs
from tunewright.studio.playing import Playing

if TYPE_CHECKING:
    from tunewright.data.dedup.leakage import LeakageReport

T = TypeVar("T")


class StillComputedError(Exception):
    """The whole page waits for a part."""

    def __init__(self, part: Part) -> None:
        self.part = part
        super().__init__(part.key)


def stamps(files: Iterable[Path]) -> list[tuple[str, int]]:
    """Return what changes when a file is written: its path and the time of its change."""
    return [(str(file), file.stat().st_mtime_ns) for file in files]


@dataclass
class Cache:
    """Kept between requests: objects that take seconds to make, and a reviewer's skipped rows."""

    playing: Playing
    computed: Computed
    reviews: dict[tuple[str, ...], ReviewSession] = field(default_factory=dict)
    """Reviews by version, reviewer and choice of rows."""
    comparisons: dict[tuple[str, str, str | None], BlindReview] = field(default_factory=dict)
    """Comparisons by evaluation, reviewer and incumbent."""
    _made: dict[object, tuple[object, Any]] = field(default_factory=dict)

    def has(self, name: object, deciding: object) -> bool:
        """Return whether the cache has an object of this name, made for these values."""
        return name in self._made and self._made[name][0] == deciding

    def once(self, name: object, deciding: object, make: Callable[[], T]) -> T:
        """Return the object made for these deciding values; make it again if the values differ."""
        if not self.has(name, deciding):
            self._made[name] = (deciding, make())
        made: T = self._made[name][1]
        return made


@dataclass
class Visit:
    """One request: the project in its current state, the session, and what makes the page."""

    project: Project
    session: StudioSession
    form: dict[str, str]
    """The fields of a sent form; empty where a page is only read."""
    path: str
    """The page's address, without its parameters."""
    place: dict[str, str]
    """Parts of the path."""
    query: dict[str, str]
    """The parameters behind the path."""
    cache: Cache
    jobs: Jobs
    templates: Environment
    refusal: UserError | None = None
    """The reason why the form of this request was not done; its page shows it with what was typed."""

    @property
    def version(self) -> DatasetVersion:
        """The current dataset version."""
        manifest = current_manifest(self.project.folder.dataset)
        if manifest is None:
            raise UserError("There are no rows yet", fix="Upload a file on the page Data.")
        return self.cache.once("version", manifest.digest, self.project.data.version)

    @property
    def rows(self) -> RowIndex:
        """The current version's rows, ready to be searched."""
        version, dataset = self.version, self.project.folder.dataset
        return self.cache.once("rows", version.digest, lambda: RowIndex(dataset, version))

    @property
    def reviews(self) -> ReviewLog:
        """All reviews of rows, as they are on disk now."""
        file = self.project.folder.dataset / REVIEWS_FILE
        stamp = (file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None
        return self.cache.once("reviews", stamp, lambda: read_reviews(self.project.folder.dataset))

    @property
    def places(self) -> KnownPlaces:
        """The places of every version's rows."""
        dataset = self.project.folder.dataset
        digests = {each.digest for each in list_versions(dataset)}
        return self.cache.once("places", digests, lambda: KnownPlaces(dataset))

    @property
    def leases(self) -> Leases:
        """The row on each session's screen, by the session's token and the choice of rows."""
        folder = self.project.folder
        return self.cache.once("leases", folder.root, lambda: Leases(folder.work / "leases"))

    @property
    def neighbors(self) -> NeighborIndex:
        """The index of the current version's rows."""
        version = self.version
        return self.cache.once("neighbors", version.digest, lambda: NeighborIndex(version))

    @property
    def leakage(self) -> LeakageReport:
        """The current version's leakage, which takes seconds to minutes to measure."""
        from tunewright.data.dedup.leakage import measure_leakage

        version, seed = self.version, self.project.folder.config.seed
        deciding = (version.digest, seed)
        return self.cache.once("leakage", deciding, lambda: measure_leakage(version, seed, self.project.reporter))

    @property
    def answers(self) -> RowAnswers:
        """The adapter's stored answers to rows."""
        files = evaluated_files(self.project.folder.evaluations)
        stamps = tuple((file, file.stat().st_mtime_ns) for file in files)
        return self.cache.once("answers", stamps, self.project.row_answers)

    def computed(self, function: Function, *arguments: object, deciding: Sequence[object] = ()) -> Part:
        """Return a part of the page that needs torch or transformers, as far as it has been computed.

        The current version and the config decide it too.
        """
        folder, manifest = self.project.folder, current_manifest(self.project.folder.dataset)
        version = None if manifest is None else manifest.digest
        decided = (version, folder.config.model_dump(mode="json"), *deciding)
        return self.cache.computed.part(function, arguments, decided)

    def needed(self, function: Function, *arguments: object, deciding: Sequence[object] = (), wait: bool) -> Any:
        """Return the value of a part without which there is no page.

        Args:
            function: as for :meth:`computed`, like ``arguments`` and ``deciding``.
            wait: wait for it. Otherwise a page says that it is being computed; a file and a form have no such page.

        Raises:
            StillComputedError: it is not there yet.
            UserError: it could not be computed.
        """
        part = self.computed(function, *arguments, deciding=deciding)
        if not part.done and wait:
            self.cache.computed.wait_for(part)
            part = self.computed(function, *arguments, deciding=deciding)
        if not part.done:
            raise StillComputedError(part)
        if part.refusal:
            raise UserError(part.refusal)
        return part.value

    def row_name(self, key: str) -> str:
        """Return a row's name on a page, "Row 17"; a row that no version here has is named by its key."""
        with suppress(UserError):  # there is no version
            if (number := self.rows.numbers.get(key)) is not None:
                return f"Row {number}"
        return f"Row {key[:12]}"

    def evaluation_name(self, name: str) -> str:
        """Return an evaluation's name on a page, "Evaluation 2"; one without a number is named by its digest."""
        return f"Evaluation {read_numbers(self.project.folder.evaluations).get(name, name)}"

    def run_name(self, name: str) -> str:
        """Return a training run's name on a page, "Run 3"; one without a number, because it runs, has its own name."""
        return f"Run {read_numbers(self.project.folder.adapters).get(name, name)}"

    def shown(self, found: Sequence[T], size: int) -> tuple[Sequence[T], dict[str, int]]:
        """Return the part of a long list that the address asks for, and the numbers of its pages for a template."""
        pages = max(1, -(-len(found) // size))
        asked = self.query.get("page", "1")
        page = min(int(asked), pages) if asked.isdecimal() and int(asked) > 0 else 1
        return found[(page - 1) * size : page * size], {"count": len(found), "page": page, "pages": pages}

    def page(self, template: str, title: str, **values: Any) -> Response:
        """Return a page."""
        folder = self.project.folder
        name = folder.root.name
        messages = [*self.session.take_messages(), *self._reported()]
        # A result and its warnings stay in sight; several notes behind them are one line, which opens.
        texts = [each for each in messages[1:] if isinstance(each, str) and "\n" not in each]
        notes = [each for each in texts if not each.startswith("Warning: ")]
        notes = notes if len(notes) > 2 else []
        refused_name, self.session.refused_name = self.session.refused_name, None
        with suppress(UserError):  # a config with a fault, which a page reports
            name = folder.config.name if folder.has_config else name
        text = self.templates.get_template(template).render(
            title=title,
            project=name,
            form_token=self.session.form_token,
            reviewer=self.session.reviewer,
            here=self.path,
            return_to=f"{self.path}?{urlencode(self.query)}" if self.query else self.path,
            demo=self.session.read_only,
            form=self.form,
            refused=self.refusal,
            row_name=self.row_name,
            evaluation_name=self.evaluation_name,
            refused_name=refused_name,
            messages=[each for each in messages if each not in notes],
            notes=notes,
            **values,
        )
        if self.session.read_only:
            # Forms that change something have no live button; no row can hold markup of a form.
            text = _POST_FORM.sub(lambda form: _LIVE_BUTTON.sub("<button disabled", form[0]), text)
        return HTMLResponse(text)

    def go(self, path: str, *messages: Notice) -> Response:
        """Return a redirection to a page, which shows the messages."""
        self.session.messages += [*(message for message in messages if message), *self._reported()]
        return RedirectResponse(path, status_code=303)

    def start(self, *words: str, message: Notice = "") -> Response:
        """Start a command as a job, and return a redirection to the job's page."""
        return self.go(path_of("jobs", self.jobs.start(*words).id), message)

    def chosen(self, field: str, known: Collection[str]) -> str:
        """Return a field that the page filled with a known value; a stale form has another."""
        value = self.form.get(field, "")
        if value not in known:
            what = f"Unknown {field.replace('_', ' ')} {value!r}"
            raise UserError(what, fix="Go back, reload the page and choose.")
        return value

    def _reported(self) -> list[str]:
        """Return the messages that the project reported, with paths relative to the project's folder."""
        reporter = self.project.reporter
        messages = reporter.messages if isinstance(reporter, PageReporter) else []
        return [message.replace(f"{self.project.folder.root}/", "") for message in messages]


_POST_FORM = re.compile('<form method="post".*?</form>', re.DOTALL)
_LIVE_BUTTON = re.compile("<button(?![^>]* disabled)")

Handler = Callable[[Visit], Response]
Handlers = dict[tuple[str, str], Handler]
"""Functions of pages by method and path."""


def in_form(path: str, page: Handler, handler: Handler) -> Handler:
    """Return a form's handler that shows a refusal on the form's page, with everything that was typed.

    ``path`` is the page's, with names of places in braces as in the form's own path.
    """

    def handle(visit: Visit) -> Response:
        try:
            return handler(visit)
        except UserError as refusal:
            visit.refusal, visit.path = refusal, path.format_map(visit.place)
            shown = page(visit)
            shown.status_code = 400
            return shown

    return handle


def verdict_of(session: AnnotationSession[Any, ItemT, VerdictT], action: str) -> VerdictT:
    """Return the verdict of the button that was pressed."""
    for _, verdict, _ in session.verdict_keys:
        if verdict == action:
            return verdict
    raise UserError(f"Unknown verdict {action!r}", fix="Use the buttons of the page.")


def positive_numbers(form: Mapping[str, str], field: str, *, several: bool = False) -> list[str]:
    """Return a field's number, or its numbers, as they were typed; none from an empty field.

    Other values are refused here: a command would take ``--x`` for an option, or refuse it once started.
    """
    typed = form.get(field, "").strip()
    texts = typed.split() if several or not typed else [typed]
    for text in texts:
        try:
            valid = 0 < float(text) < math.inf
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"Not a positive number: {text!r}", where=field, fix="Correct it.")
    return texts


def path_of(*parts: str) -> str:
    """Return a path of the studio from its parts, escaped."""
    return "".join(f"/{quote(part, safe='')}" for part in parts)
