"""From a recipe's base and stored adapters to a running server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.adapters.registry import adapter_digest
from tunewright.chat import ChatFormat
from tunewright.chat.answers import stop_strings
from tunewright.models.bases import Base
from tunewright.models.loading import context_length, load_model, named, with_adapters
from tunewright.progress import Reporter
from tunewright.recipe import Quantize, Recipe
from tunewright.serving.access import OpenAccess
from tunewright.serving.app import create_app
from tunewright.serving.engine import Engine
from tunewright.serving.server import serve, serving
from tunewright.serving.state import State
from tunewright.serving.tenancy import TenantAccess


@dataclass(frozen=True)
class Tenancy:
    """What a server needs to answer tenants.

    Args:
        state: tenants, keys and releases; the server closes it.
        locate: a released adapter's folder, by its name and digest.
    """

    state: State
    locate: Callable[[str, str], Path]


class Service:
    """A base and adapters, loaded and ready to be served.

    Args:
        recipe: gives precision, address, port and batch.
        quantize: how the base is held.
        served: folders of adapters by the names that everybody may ask for; or the tenants and their releases, whose
            adapters are loaded when the server starts.
        host, port: in place of the recipe's.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Base,
        chat: ChatFormat,
        quantize: Quantize,
        served: Mapping[str, Path] | Tenancy,
        reporter: Reporter,
        *,
        host: str | None = None,
        port: int | None = None,
    ) -> None:
        adapters = {} if isinstance(served, Tenancy) else served
        reporter.say(
            f"Loading {named(base, quantize)}" + (f" with {len(adapters)} of its adapters" if adapters else "")
        )
        model: Any = load_model(base, recipe.train.dtype, quantize)
        digests = {name: adapter_digest(folder) for name, folder in adapters.items()}
        if adapters:
            # By its digest, an adapter is there once under however many names.
            model = with_adapters(model, {digests[name]: folder for name, folder in adapters.items()})
        self.host = recipe.serve.host if host is None else host
        self.port = recipe.serve.port if port is None else port
        self._engine = Engine(
            model,
            stop_ids=chat.stop_ids,
            pad_id=chat.tokenizer.pad_token_id,
            max_batch=recipe.serve.max_batch,
            context_length=context_length(base),
        )
        self._access = (
            TenantAccess(served.state, self._engine, served.locate, reporter)
            if isinstance(served, Tenancy)
            else OpenAccess({base.spec: None, **digests})
        )
        self._app = create_app(
            self._engine, self._access, render=chat.prompt, decode=chat.text, stops=stop_strings(recipe, chat)
        )

    @property
    def models(self) -> list[str]:
        """What can be asked for by name, by whoever may; of tenants' aliases, those that are live."""
        return self._access.names

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
