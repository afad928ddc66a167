"""Parts of pages that need torch or transformers: a child process computes them, so that no page waits for the import.

The child (``python -m tunewright.studio.computed FOLDER``) reads pickled requests from this process, and answers each
with a pickled `Part`. It ends with this process.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Condition, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any

from tunewright.api import Project
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError, missing_extra
from tunewright.core.io import digest
from tunewright.core.processes import PIPE, Process, end, start
from tunewright.core.progress import LogReporter
from tunewright.data.trace import find_row
from tunewright.data.versions import load_version
from tunewright.models.bases import local_base
from tunewright.models.sources import PACKAGED, has_packaged

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat
    from tunewright.chat.inspection import TokenView
    from tunewright.data.review.label_models import Suspect
    from tunewright.evaluation.time_limit import AnswersEstimate

_MOST = 200  # parts in memory
_REFUSED_S = 10.0
"""A failed part is computed again for a page that is opened later: the reason may be gone."""
Function = Callable[..., Any]
"""A function of a module, called with the project."""


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


@dataclass(frozen=True)
class Part:
    """A part of a page, which is being computed until it is ``done``."""

    key: str
    """Digest of everything that decides it."""
    done: bool = False
    value: Any = None
    refusal: str = ""
    """The reason why there is no value."""
    messages: tuple[str, ...] = ()
    """Messages of the computation."""


class Computed:
    """The child process, and the parts that it has computed. A thread waits for it, and no page does."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._changed = Condition()
        self._waiting: OrderedDict[str, tuple[Function, Sequence[Any]]] = OrderedDict()
        self._parts: OrderedDict[str, tuple[Part, float]] = OrderedDict()
        self._thread: Thread | None = None
        self._child: Process | None = None
        self._closing = False

    def warm(self) -> None:
        """Start the child, which reads what most parts need."""
        self.part(_load, ())

    def part(self, function: Function, arguments: Sequence[Any], deciding: Sequence[Any] = ()) -> Part:
        """Return a part as far as it is known, and have it computed if it is not.

        Args:
            function: a function of a module; the child calls it with its own project.
            arguments: the further arguments, which JSON can hold.
            deciding: what else decides the part, such as the time of a file's change.
        """
        key = digest([function.__module__, function.__qualname__, *arguments, *deciding])
        with self._changed:
            if key in self._parts:
                found, when = self._parts[key]
                if not found.refusal or monotonic() - when < _REFUSED_S:
                    self._parts.move_to_end(key)
                    return found
            if self._closing:
                return Part(key, done=True, refusal="The studio is shutting down.")
            self._waiting[key] = (function, arguments)
            if self._thread is None:
                self._thread = Thread(target=self._run, name="tunewright-computed", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return Part(key)

    def is_waiting(self, key: str) -> bool:
        """Return whether a part has yet to be computed."""
        with self._changed:
            return key in self._waiting

    def wait_for(self, part: Part) -> None:
        """Wait until a part has been computed."""
        with self._changed:
            self._changed.wait_for(lambda: part.key not in self._waiting)

    def close(self) -> None:
        """End the child, even while it computes."""
        with self._changed:
            self._closing = True
            self._waiting.clear()
            if self._child is not None:
                self._child.kill()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    break
                # The newest first: somebody looks at its page.
                key = next(reversed(self._waiting))
                request = self._waiting[key]
                if self._child is None or self._child.poll() is not None:
                    self._start()
            part = self._ask(key, request)
            with self._changed:
                self._waiting.pop(key, None)
                self._parts[key] = (part, monotonic())
                while len(self._parts) > _MOST:
                    self._parts.popitem(last=False)
                self._changed.notify_all()
        if self._child is not None:
            end(self._child)
            self._child = None

    def _start(self) -> None:
        if self._child is not None:
            end(self._child)
        # -P: nothing is imported from the working directory. Its errors are shown where the studio runs.
        self._child = start([sys.executable, "-P", "-m", __name__, str(self._root)], stdout=PIPE)

    def _ask(self, key: str, request: tuple[Function, Sequence[Any]]) -> Part:
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        try:
            pickle.dump((key, *request), child.stdin)
            child.stdin.flush()
            part: Part = pickle.load(child.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):  # it ended, perhaps in the middle of an answer
            refusal = f"The process that computes this ended with code {child.wait()}. Reload the page in a moment."
            return Part(key, done=True, refusal=refusal)
        return part


# In the child


_kept: tuple[object, ChatFormat] | None = None
"""The chat format, with the config's values that decide it: to read a tokenizer takes seconds."""


def _load(project: Project) -> None:
    """Import what most parts need, and read the tokenizer if it is on this machine."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    if not project.folder.has_config:
        return
    config = project.folder.config
    # Nothing is downloaded that nobody asked for.
    if config.base_model not in PACKAGED or has_packaged(config.base_model):
        _ = local_base(config.base_model, config.revision, project.folder.root, project.reporter) and project.chat


def row_tokens(project: Project, key: str) -> list[list[TokenView]]:
    """Return the tokens of a row of the current version, for each row of the training that it makes."""
    from tunewright.chat.inspection import view

    config = project.folder.config
    if local_base(config.base_model, config.revision, project.folder.root, project.reporter) is None:
        raise UserError("The base is not on this machine yet", fix="The first training downloads it.")
    member = find_row(project.folder.dataset, load_version(project.folder.dataset), key)
    return [view(project.chat, row) for row in project.chat.rows(member.example.messages)]


def evaluation_estimates(project: Project, adapter: str) -> dict[str, AnswersEstimate | str]:
    """Return what an evaluation on each split has to compute, or why that is unknown; no model is loaded."""
    found: dict[str, AnswersEstimate | str] = {}
    for split in ("test", "dev"):
        try:
            found[split] = project.estimate_evaluation(adapter, dev=split == "dev", embed=False)
        except UserError as error:
            found[split] = str(error)
    return found


def stored_suspects(project: Project, judge: str) -> list[Suspect] | None:
    """Return the stored suspects of the current version by a judge; None if they were not searched yet."""
    return project.data.stored_suspects(load_version(project.folder.dataset), judge or None)


def stored_searches(project: Project, judges: Sequence[str]) -> dict[str, list[Suspect]]:
    """Return the suspects of each search whose result is stored, by judge; an empty name is the default search."""
    found: dict[str, list[Suspect]] = {}
    for judge in judges:
        with suppress(UserError):  # an adapter of another base judges no rows
            if (suspects := stored_suspects(project, judge)) is not None:
                found[judge] = suspects
    return found


def _compute(root: Path, key: str, function: Function, arguments: Sequence[Any]) -> Part:
    global _kept
    reporter = PageReporter()
    project = Project(ProjectFolder(root), reporter)
    try:
        config = project.folder.config if project.folder.has_config else None
        deciding = config and (config.base_model, config.revision, config.chat)
        if _kept is not None and _kept[0] == deciding:
            project.chat = _kept[1]
        value = function(project, *arguments)
        if "chat" in vars(project):
            _kept = (deciding, project.chat)
    except (UserError, ModuleNotFoundError) as error:
        refusal = missing_extra(error) or error
        if not isinstance(refusal, UserError):
            raise
        return Part(key, done=True, refusal=str(refusal).replace("\n", ". ", 1).replace(f"{root}/", ""))
    messages = tuple(message.replace(f"{root}/", "") for message in reporter.messages)
    return Part(key, done=True, value=value, messages=messages)


def _read(requests: SimpleQueue[tuple[str, Function, Sequence[Any]]]) -> None:
    with open(0, "rb") as source:  # not sys.stdin, for whose lock Python would wait at exit
        while True:
            try:
                requests.put(pickle.load(source))
            except EOFError:
                os._exit(0)  # the studio has ended, even while a part is computed


def _main(root: Path) -> None:
    # Only parts are written to the pipe; what a library prints is shown where the studio runs.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: SimpleQueue[tuple[str, Function, Sequence[Any]]] = SimpleQueue()
    Thread(target=_read, args=(requests,), daemon=True).start()
    while True:
        pickle.dump(_compute(root, *requests.get()), answers)
        answers.flush()


if __name__ == "__main__":
    # Pickles name the classes by their module.
    from tunewright.studio import computed

    computed._main(Path(sys.argv[1]))
