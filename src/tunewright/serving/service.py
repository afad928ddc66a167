"""From a recipe's base and stored adapters to a running server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunewright.chat import ChatFormat
from tunewright.chat.answers import stop_strings
from tunewright.models.bases import Base
from tunewright.models.loading import context_length, load_model, named, with_adapters
from tunewright.progress import Reporter
from tunewright.recipe import Quantize, Recipe
from tunewright.serving.app import create_app
from tunewright.serving.engine import Engine, ServedModel
from tunewright.serving.server import serve, serving


class Service:
    """A base and adapters, loaded and ready to be served.

    Args:
        recipe: gives precision, address, port and batch.
        quantize: how the base is held.
        adapters: folders by the names that clients ask for.
        host, port: in place of the recipe's.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Base,
        chat: ChatFormat,
        quantize: Quantize,
        adapters: Mapping[str, Path],
        reporter: Reporter,
        *,
        host: str | None = None,
        port: int | None = None,
    ) -> None:
        reporter.say(
            f"Loading {named(base, quantize)}" + (f" with {len(adapters)} of its adapters" if adapters else "")
        )
        model: Any = load_model(base, recipe.train.dtype, quantize)
        # peft makes module names of adapter names, which may hold no dot: inside, adapters are numbered.
        inside = {f"adapter_{number}": name for number, name in enumerate(adapters)}
        if adapters:
            model = with_adapters(model, {key: adapters[name] for key, name in inside.items()})
        served = [ServedModel(base.spec, None), *(ServedModel(name, key) for key, name in inside.items())]
        self.models = [model.name for model in served]
        self.host = recipe.serve.host if host is None else host
        self.port = recipe.serve.port if port is None else port
        self._engine = Engine(
            model,
            served,
            stop_ids=chat.stop_ids,
            pad_id=chat.tokenizer.pad_token_id,
            max_batch=recipe.serve.max_batch,
            context_length=context_length(base),
        )
        self._app = create_app(self._engine, render=chat.prompt, decode=chat.text, stops=stop_strings(recipe, chat))

    def run(self, on_ready: Callable[[str], None]) -> None:
        """Serve until Ctrl-C or SIGTERM; ``on_ready`` is told the address.

        Raises:
            UserError: the address cannot be listened on.
        """
        try:
            serve(self._app, self.host, self.port, on_ready=on_ready)
        finally:
            self._engine.stop()

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve in the background while the block runs, which is given the address.

        Raises:
            UserError: the address cannot be listened on.
        """
        try:
            with serving(self._app, self.host, self.port) as url:
                yield url
        finally:
            self._engine.stop()
