"""One request's view of the project, which the pages are made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from jinja2 import Environment
from starlette.responses import HTMLResponse, RedirectResponse, Response

from tunewright.api import Project
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.data.review.label_models import NeighborIndex
from tunewright.data.review.session import ReviewSession
from tunewright.data.versions import DatasetVersion, current_manifest
from tunewright.evaluation.human_eval.session import BlindReview
from tunewright.studio.access import StudioSession
from tunewright.studio.jobs import Jobs
from tunewright.studio.playing import Playing

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat


class PageReporter(LogReporter):
    """Collects messages for the page that is being made."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        """Add a message."""
        self.messages.append(message)

    def warn(self, message: str) -> None:
        """Add a warning."""
        self.messages.append(f"Warning: {message}")


@dataclass
class Cache:
    """Kept between requests: the current version, which takes seconds to load, and which rows a reviewer skipped."""

    playing: Playing
    version: DatasetVersion | None = None
    texts: tuple[str, ...] = ()
    """Its rows as a search sees them: key, input and answer in lower case."""
    neighbors: NeighborIndex | None = None
    """Of that version."""
    chat: tuple[tuple[object, ...], ChatFormat] | None = None
    """The chat format, and the values of the config that decided it."""
    reviews: dict[tuple[str, str], ReviewSession] = field(default_factory=dict)
    """By version and reviewer."""
    comparisons: dict[tuple[str, str], BlindReview] = field(default_factory=dict)
    """By evaluation and reviewer."""


@dataclass
class Visit:
    """One request: the project in its current state, the session, and what makes the page."""

    project: Project
    session: StudioSession
    form: dict[str, str]
    """The fields of a sent form; empty where a page is only read."""
    place: dict[str, str]
    """Parts of the path."""
    query: dict[str, str]
    """The parameters behind the path."""
    cache: Cache
    jobs: Jobs
    templates: Environment

    @property
    def version(self) -> DatasetVersion:
        """The current dataset version.

        Raises:
            UserError: no version exists, or its files were changed.
        """
        manifest = current_manifest(self.project.folder.dataset)
        if manifest is None:
            raise UserError("There are no rows yet", fix="Upload a file on the page Data.")
        if self.cache.version is None or self.cache.version.digest != manifest.digest:
            version = self.project.data.version()
            self.cache.version, self.cache.neighbors = version, None
            self.cache.texts = tuple(
                f"{m.key} {m.example.input_text} {m.example.output}".casefold() for m in version.members
            )
        return self.cache.version

    @property
    def neighbors(self) -> NeighborIndex:
        """The index of the current version's rows."""
        version = self.version
        if self.cache.neighbors is None:
            self.cache.neighbors = NeighborIndex(version)
        return self.cache.neighbors

    @property
    def chat(self) -> ChatFormat:
        """The project's chat format."""
        config = self.project.folder.config
        deciding = (config.base_model, config.revision, config.chat)
        if self.cache.chat is None or self.cache.chat[0] != deciding:
            self.cache.chat = (deciding, self.project.chat)
        return self.cache.chat[1]

    def page(self, template: str, title: str, **values: Any) -> Response:
        """Return a page."""
        reporter = self.project.reporter
        reported = reporter.messages if isinstance(reporter, PageReporter) else []
        text = self.templates.get_template(template).render(
            title=title,
            project=self.project.folder.config.name,
            form_token=self.session.form_token,
            reviewer=self.session.reviewer,
            messages=[*self.session.take_messages(), *reported],
            **values,
        )
        return HTMLResponse(text)

    def go(self, path: str, *messages: str) -> Response:
        """Return a redirection to a page, which shows the messages."""
        reporter = self.project.reporter
        reported = reporter.messages if isinstance(reporter, PageReporter) else []
        self.session.messages += [*reported, *(message for message in messages if message)]
        return RedirectResponse(path, status_code=303)


Handler = Callable[[Visit], Response]
Handlers = dict[tuple[str, str], Handler]
"""Functions of pages by method and path."""


def path_of(*parts: str) -> str:
    """Return a path of the studio from its parts, escaped."""
    return "".join(f"/{quote(part, safe='')}" for part in parts)
