"""The embedded loop for whole lists of requests: a base in this process, loaded once, with its adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache

from tunewright.chat import ChatFormat
from tunewright.config import Quantization
from tunewright.core.progress import Reporter
from tunewright.generation.generate import BatchSize, generate_halving
from tunewright.generation.requests import Completion, Request
from tunewright.models.bases import Base
from tunewright.models.loading import load_model, named, with_adapters


class EmbeddedAnswers:
    """A base that is loaded once, and only if needed, and decodes lists of requests alone or with an adapter.

    Args:
        base, dtype, quantization: the model, its precision and its quantization.
        chat: the format of prompts and answers.
        batch_size: number of rows that decode at once.
        reporter: receives messages.
    """

    def __init__(
        self, base: Base, chat: ChatFormat, dtype: str, quantization: Quantization, batch_size: int, reporter: Reporter
    ) -> None:
        self._base = base
        self._chat = chat
        self._dtype = dtype
        self._quantization = quantization
        self._reporter = reporter
        self._model: Any = None
        self._size = BatchSize(batch_size)
        self._sizes: dict[int, BatchSize] = {}
        self.adapters: set[str] = set()
        """Names of the adapters on the base."""

    @property
    def rows(self) -> int:
        """Number of rows that decode at once; fewer than at the start if memory ran out."""
        return self._size.rows

    @property
    def loaded(self) -> bool:
        """True if the base is in memory."""
        return self._model is not None

    def model_with(self, adapter: tuple[str, Path] | None = None) -> Any:
        """Return the base with this adapter, given as name and folder, and earlier ones."""
        if self._model is None:
            self._reporter.say(f"Loading {named(self._base, self._quantization)}")
            self._model = load_model(self._base, self._dtype, self._quantization)
        if adapter is not None and adapter[0] not in self.adapters:
            self._model = with_adapters(self._model, dict([adapter]))
            self.adapters.add(adapter[0])
        return self._model

    def drop(self) -> None:
        """Free the base."""
        if self._model is None:
            return
        self._model = None
        self.adapters.clear()
        # Models hold reference cycles, and torch caches GPU memory.
        clear_device_cache(garbage_collection=True)

    def generate(
        self,
        requests: Sequence[Request],
        on_finished: Callable[[int, Completion], None] = lambda _index, _completion: None,
        *,
        stop_ids: Collection[int],
        adapter: tuple[str, Path] | None = None,
        at_once: int | None = None,
    ) -> list[Completion]:
        """Answer all requests; when memory runs out, halve the batch for the remaining ones.

        Args:
            requests: what to complete.
            on_finished: called with a request's index and its completion, in any order.
            stop_ids: tokens that end an answer.
            adapter: name and folder of the adapter that the requests name.
            at_once: number of rows that decode together (None: ``rows``).

        Raises:
            UserError: memory does not suffice for a single answer.
        """
        return generate_halving(
            self.model_with(adapter),
            requests,
            self._size if at_once is None else self._sizes.setdefault(at_once, BatchSize(at_once)),
            self._reporter,
            stop_ids=stop_ids,
            pad_id=self._chat.tokenizer.pad_token_id,
            decode=self._chat.text,
            on_finished=on_finished,
        )
