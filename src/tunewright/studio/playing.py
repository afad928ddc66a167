"""The playground: a base that a thread loads, questions, and answers as they are computed."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Literal

from tunewright.api import Project
from tunewright.config import Config
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.core.text import visible
from tunewright.data.versions import DatasetVersion
from tunewright.serving.playground_answers import ALIAS, PlaygroundAnswer

if TYPE_CHECKING:
    from tunewright.serving.playground import Playground
    from tunewright.studio.live_answers import TenantServer

_MOST = 50  # questions in memory


@dataclass
class AskedQuestion:
    """A question, and the answers so far."""

    text: str
    models: tuple[str, ...]
    version: DatasetVersion | None
    limit: int | None
    temperature: float = 0.0
    before: AskedQuestion | None = None
    """The turn before this one."""
    server: TenantServer | None = None
    """The server that answers for live aliases; None if none is asked."""
    answers: dict[str, PlaygroundAnswer | UserError] = field(default_factory=dict)
    """Answers by model, without answers whose browser has left."""
    feedback: dict[str, dict[str, str]] = field(default_factory=dict)
    """The recorded feedback on answers of live aliases, by model."""

    def earlier(self, model: str) -> tuple[tuple[str, str], ...]:
        """Return the earlier turns with a model's own answers, without turns that it did not answer."""
        if self.before is None:
            return ()
        answer = self.before.answers.get(model)
        turn = () if answer is None or isinstance(answer, UserError) else ((self.before.text, answer.text),)
        return (*self.before.earlier(model), *turn)

    @property
    def complete(self) -> bool:
        """True if no model has to answer any more."""
        return all(model in self.answers for model in self.models)


class Playing:
    """The playground's state between requests."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = Lock()
        self.state: Literal["empty", "loading", "ready", "failed"] = "empty"
        self.error: UserError | None = None
        """The reason for the state ``failed``."""
        self.playground: Playground | None = None
        self._questions: dict[str, AskedQuestion] = {}

    def load(self) -> None:
        """Start to load the base, unless it is loading or already loaded."""
        with self._lock:
            if self.state in ("loading", "ready"):
                return
            self.state, self.error = "loading", None
        # No page waits for it, and it holds no lock of a page.
        Thread(target=self._load, name="tunewright-playground", daemon=True).start()

    def _load(self) -> None:
        try:
            from tunewright.serving.playground import Playground

            made = Playground(Project(ProjectFolder(self._root), LogReporter()))
        except UserError as error:
            with self._lock:
                self.state, self.error = "failed", error
        except BaseException as error:
            with self._lock:
                self.state, self.error = "failed", UserError(f"The base could not be loaded: {error}")
            raise
        else:
            with self._lock:
                self.state, self.playground = "ready", made

    def unload(self) -> None:
        """Free the base's memory; answers in progress end."""
        with self._lock:
            if self.state == "loading":
                raise UserError("The base is still loading", fix="Wait until it is loaded.")
            made, self.playground, self.state = self.playground, None, "empty"
        if made is not None:
            made.stop()

    def is_outdated(self, config: Config) -> bool:
        """Return whether the config has changed since the base was loaded."""
        made = self.playground
        return made is not None and made.config != config

    def ask(self, question: AskedQuestion) -> str:
        """Keep a question, and return its ID. The oldest is forgotten."""
        name = secrets.token_hex(8)
        with self._lock:
            self._questions[name] = question
            for old in list(self._questions)[:-_MOST]:
                del self._questions[old]
        return name

    def question(self, name: str) -> AskedQuestion:
        """Return a question."""
        found = self._questions.get(name)
        if found is None:
            raise UserError("The input is not in memory any more", fix="Ask it again on the page Playground.")
        return found

    async def answers(self, question: AskedQuestion) -> AsyncGenerator[tuple[int, str], None]:
        """Compute the missing answers together, and yield their texts with the model's place in the question.

        Closing the generator ends the computation.
        """
        events: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
        missing = [place for place, model in enumerate(question.models) if model not in question.answers]
        tasks = [asyncio.create_task(self._answer(question, place, events)) for place in missing]
        try:
            left = len(tasks)
            while left:
                place, text = await events.get()
                if text is None:
                    left -= 1
                else:
                    yield place, text
        finally:
            for task in tasks:
                task.cancel()

    async def _answer(self, question: AskedQuestion, place: int, events: asyncio.Queue[tuple[int, str | None]]) -> None:
        model = question.models[place]
        try:
            how: Any = {"earlier": question.earlier(model), "temperature": question.temperature}
            if question.server is not None and model.startswith(ALIAS):
                answer = question.server.answer(model, question.text, question.limit, **how)
            elif self.playground is not None:
                answer = self.playground.answer(question.text, model, question.version, question.limit, **how)
            else:
                raise UserError("The base is not loaded", fix="Load it on the page Playground.")
            async with aclosing(answer) as parts:
                async for part in parts:
                    if isinstance(part, str):
                        events.put_nowait((place, part))
                    else:
                        question.answers[model] = part
        except UserError as error:
            question.answers[model] = error
        finally:
            # Also after an unforeseen error: nobody waits for an answer that does not come.
            events.put_nowait((place, None))

    async def events(self, question: AskedQuestion) -> AsyncGenerator[str, None]:
        """Yield the answers as server-sent events; ``finished`` at the end."""
        async with aclosing(self.answers(question)) as pieces:
            async for place, text in pieces:
                yield f"data: {json.dumps({'model': place, 'text': visible(text)})}\n\n"
        yield "event: finished\ndata:\n\n"
