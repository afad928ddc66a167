"""The engine ``peft``: one thread owns the model and the running batch, and delivers tokens as they are computed."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tunewright.adapters.lora_weights import load_lora_weights
from tunewright.adapters.registry import require_digest
from tunewright.core.errors import UserError
from tunewright.engines.protocol import (
    PREFILL_TOKENS,
    AdapterFailedError,
    ConstraintFailedError,
    Delta,
    EngineStoppedError,
    Event,
    RequestFailedError,
    TokenSink,
)
from tunewright.generation.batched_lora import Lora
from tunewright.generation.decoding import PrefillState
from tunewright.generation.generate import prefill_groups
from tunewright.generation.lora_dispatch import adapter_sort_keys
from tunewright.generation.plain_decoding import new_batch
from tunewright.generation.requests import Request, Row
from tunewright.models.loading import release_openmp_threads

log = logging.getLogger("tunewright")


class _Sequence:
    """A request inside the engine. Only ``subscription`` is shared with other threads."""

    def __init__(self, request: Request, subscription: Subscription) -> None:
        self.request = request
        self.subscription = subscription
        self.row: Row | None = None
        self._delivered = 0

    @property
    def cancelled(self) -> bool:
        return self.subscription.cancelled

    @property
    def finished(self) -> bool:
        return self.row is not None and self.row.finish is not None

    def new_tokens(self) -> Delta:
        """Return the tokens that no earlier call returned."""
        assert self.row is not None
        before, self._delivered = self._delivered, len(self.row.ids)
        return Delta(tuple(self.row.ids[before:]), self.row.finish, tuple(self.row.logprobs[before:]))


class PeftEngine:
    """Answers requests for the base and its adapters together, in one batch.

    Adapters are held alongside the model, which they do not change. Another thread reads their files; to add one takes
    the engine's thread about a millisecond between two steps (docs/decisions/0024).

    The engine has no scheduling policy: free rows are filled in the order of submission. Which tenant's request is
    submitted next is decided in :mod:`tunewright.serving.gateway.fair_scheduler`.

    Args:
        model: a base that only this engine uses from now on. Or a PeftModel, whose adapters are then addressed
            by their names, and no other adapters can be: see :class:`tunewright.generation.decoding.Batch`.
        stop_ids, pad_id: see :class:`tunewright.generation.decoding.Batch`.
        max_num_seqs: the number of rows that decode at once; further requests wait.
        context_length: maximum tokens of a prompt and its answer together.
    """

    name = "peft"
    unsupported: frozenset[str] = frozenset()
    prefill_tokens = PREFILL_TOKENS

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Collection[int],
        pad_id: int,
        max_num_seqs: int,
        context_length: int,
    ) -> None:
        assert max_num_seqs >= 1
        self.max_num_seqs = max_num_seqs
        self.context_length = context_length
        self._model = model
        self._loaded: set[str] = set(getattr(model, "peft_config", ()))
        self._batch = new_batch(model, stop_ids=stop_ids, pad_id=pad_id)
        # Guards state shared with other threads: the stop, the commands and the two lists of sequences.
        self._changed = threading.Condition()
        self._commands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._prefilling: dict[_Sequence, PrefillState] = {}
        """Long prompts that are partly computed; the oldest first."""
        self._dispatch = TokenDispatch()
        self._stopped: str | None = None
        release_openmp_threads()  # the thread that loaded the model has computed with them
        self._thread = threading.Thread(target=self._run, name="tunewright-engine", daemon=True)
        self._thread.start()

    @property
    def stopped(self) -> str | None:
        return self._stopped

    @property
    def permanently_stopped(self) -> bool:
        return self._stopped is not None

    @property
    def in_flight(self) -> tuple[int, int]:
        with self._changed:
            return len(self._running), len(self._waiting)

    def submit(self, request: Request, sink: TokenSink, *, tenant: str = "") -> Callable[[], object]:  # noqa: ARG002
        """Start a request: see :meth:`tunewright.engines.protocol.Engine.submit`.

        Nothing is kept from one request to the next, so the tenant makes no difference here.
        """
        subscription = Subscription(sink)
        if request.adapter is not None and request.adapter not in self._loaded:
            sink.deliver(RequestFailedError(f"The adapter {request.adapter} is not loaded."))
            return lambda: None

        def abort() -> None:
            with self._changed:
                subscription.cancelled = True
                self._changed.notify()

        with self._changed:
            stopped = self._stopped
            if stopped is None:
                self._waiting.append(_Sequence(request, subscription))
                self._changed.notify()
        if stopped is not None:
            sink.deliver(EngineStoppedError(stopped))
        return abort

    async def load(self, digest: str, folder: Path) -> None:
        """Add an adapter; running requests continue while its weights are read."""
        if digest in self._loaded:
            return

        def read() -> dict[str, Lora]:
            require_digest(folder, digest)
            return load_lora_weights(folder, self._model)

        try:
            loras = await asyncio.to_thread(read)
        except UserError:
            raise
        except Exception as error:  # one unreadable adapter must not end the loop that follows all releases
            log.exception("failed to read an adapter")
            raise AdapterFailedError(f"Failed to read the adapter {digest}: {error}") from error

        def put() -> None:
            self._batch.add_adapter(digest, loras)
            self._loaded.add(digest)

        await self._run_between_steps(put)

    async def unload(self, digest: str) -> None:
        """Free an adapter that no running request needs."""

        def drop() -> None:
            if any(sequence.request.adapter == digest for sequence in self._running):
                raise ValueError(f"a running request needs the adapter {digest}")
            self._batch.remove_adapter(digest)
            self._loaded.discard(digest)

        await self._run_between_steps(drop)

    def stop(self) -> None:
        with self._changed:
            self._stopped = self._stopped or "The server is shutting down."
            self._changed.notify()
        self._thread.join()

    async def _run_between_steps(self, command: Callable[[], None]) -> None:
        """Run a command in the engine's thread, the only one that may touch the model, between two steps."""
        done: Future[None] = Future()
        with self._changed:
            if self._stopped:
                raise EngineStoppedError(self._stopped)
            self._commands.append((command, done))
            self._changed.notify()
        await asyncio.wrap_future(done)

    def _run(self) -> None:
        try:
            with self._batch.attached():
                while self._wait_for_work():
                    self._step()
        except Exception as error:
            log.exception("the engine failed; the server answers 503 from now on")
            with self._changed:
                self._stopped = f"The model failed and the server must be restarted: {error}"
        with self._changed:
            assert self._stopped is not None
            for sequence in (*self._running, *self._waiting):
                self._dispatch.put(sequence.subscription, EngineStoppedError(self._stopped))
            self._dispatch.send()
            self._running, self._waiting = [], deque()
            for _, done in self._commands:
                if done.set_running_or_notify_cancel():
                    done.set_exception(EngineStoppedError(self._stopped))
            self._commands.clear()

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; return False once the engine must stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._running or self._waiting or self._commands)
            return self._stopped is None

    def _step(self) -> None:
        """Drop cancelled requests, run commands, prefill new requests, then decode one token for every row."""
        # Before the commands: an adapter may be unloaded as soon as its last request is cancelled.
        self._drop_cancelled()
        self._run_commands()
        with self._changed:
            admitted = self._admit_waiting()
            # From here on these sequences count as running, and receive the error of any failure.
            self._running += admitted
        self._prefill(admitted)
        self._release_finished()
        # First tokens are sent before the decode step, which takes as long again: they do not wait for it.
        self._dispatch.send()
        if self._batch.rows:
            for row, error in self._batch.step():
                self._fail(next(sequence for sequence in self._running if sequence.row is row), error)
            for sequence in self._running:
                if sequence not in self._prefilling:
                    self._dispatch.put(sequence.subscription, sequence.new_tokens())
            self._release_finished()
            self._dispatch.send()

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled = [sequence for sequence in self._running if sequence.cancelled]
            self._running = [sequence for sequence in self._running if not sequence.cancelled]
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.cancelled)
        for sequence in cancelled:
            self._drop(sequence)

    def _admit_waiting(self) -> list[_Sequence]:
        """Take as many waiting sequences as there are free rows, the oldest first."""
        free = self.max_num_seqs - len(self._running)
        return [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]

    def _prefill(self, admitted: list[_Sequence]) -> None:
        """Compute the short prompts in groups of similar length, and a chunk of at most two long ones."""
        short = [sequence for sequence in admitted if len(sequence.request.prompt_ids) <= self._batch.prefill_chunk]
        by_adapter = adapter_sort_keys([sequence.request.adapter for sequence in short])
        for group in prefill_groups([len(sequence.request.prompt_ids) for sequence in short]):
            # Rows of one adapter next to each other need no reordering in each layer.
            self._prefill_together([short[place] for place in sorted(group, key=by_adapter.__getitem__)])
        for sequence in admitted:
            if sequence not in short:
                self._prefilling[sequence] = self._batch.start_prefill([sequence.request])
        # One chunk of the oldest prompt and one of the prompt with the least left: a long prompt
        # delays short prompts by a chunk at most, and is not starved by them.
        least_left = sorted(self._prefilling, key=lambda sequence: self._prefilling[sequence].remaining_tokens)
        for sequence in dict.fromkeys([*list(self._prefilling)[:1], *least_left[:1]]):
            self._prefill_chunk(sequence)

    def _run_commands(self) -> None:
        while self._commands:
            command, done = self._commands.popleft()
            if not done.set_running_or_notify_cancel():
                continue  # the request's caller was cancelled
            try:
                command()
            except Exception as error:
                log.exception("failed to change the adapters")
                done.set_exception(AdapterFailedError(f"The engine could not change its adapters: {error}"))
            else:
                done.set_result(None)

    def _prefill_together(self, sequences: list[_Sequence]) -> None:
        """Compute prompts in one pass; if that fails, one by one, so that only the request at fault fails."""
        try:
            rows = self._batch.admit([sequence.request for sequence in sequences])
        except Exception as error:  # noqa: BLE001 - _fail logs it
            if len(sequences) > 1:
                for sequence in sequences:
                    self._prefill_together([sequence])
                return
            self._fail(sequences[0], error)
            return
        for sequence, row in zip(sequences, rows, strict=True):
            sequence.row = row
            self._dispatch.put(sequence.subscription, sequence.new_tokens())

    def _prefill_chunk(self, sequence: _Sequence) -> None:
        """Compute a chunk of a long prompt; after the last chunk its row decodes with the others."""
        reading = self._prefilling[sequence]
        try:
            if not self._batch.prefill(reading, self._batch.prefill_chunk):
                return
        except Exception as error:  # noqa: BLE001 - _fail logs it
            self._fail(sequence, error)
        else:
            (sequence.row,) = reading.rows
            self._dispatch.put(sequence.subscription, sequence.new_tokens())
        del self._prefilling[sequence]

    def _fail(self, sequence: _Sequence, error: Exception) -> None:
        with self._changed:
            self._running.remove(sequence)
        if isinstance(error, UserError) and sequence.request.constraint is not None:
            failure: RequestFailedError = ConstraintFailedError(error.what)
        else:
            log.error("failed to compute a request", exc_info=error)
            failure = RequestFailedError(f"The model could not compute this request: {error}")
        self._dispatch.put(sequence.subscription, failure)

    def _drop(self, sequence: _Sequence) -> None:
        self._prefilling.pop(sequence, None)
        if sequence.row is not None:
            self._batch.cancel(sequence.row)

    def _release_finished(self) -> None:
        with self._changed:
            self._running = [sequence for sequence in self._running if not sequence.finished]


class Subscription:
    """A request's sink with its event loop; create it in that loop.

    ``cancelled`` is set by :meth:`cancel`, or by the dispatch once the loop is closed. The engine then drops the
    request, and no event reaches the sink any more.
    """

    def __init__(self, sink: TokenSink) -> None:
        self.loop = asyncio.get_running_loop()
        self.cancelled = False
        self._sink = sink

    def deliver(self, event: Event) -> None:
        """Hand an event to the sink; call it in the subscription's loop."""
        if not self.cancelled:
            self._sink.deliver(event)


class TokenDispatch:
    """Events of one engine step, collected in the engine's thread and sent together.

    Waking a loop from another thread costs more than delivering a token, and takes the interpreter away from the
    engine's next step. So each loop is woken once a step, however many rows it has (docs/decisions/0023).
    """

    def __init__(self) -> None:
        self._events: dict[asyncio.AbstractEventLoop, list[tuple[Subscription, Event]]] = defaultdict(list)

    def put(self, subscription: Subscription, event: Event) -> None:
        """Add an event to the next :meth:`send`."""
        self._events[subscription.loop].append((subscription, event))

    def send(self) -> None:
        """Send the collected events."""
        for loop, events in self._events.items():
            try:
                loop.call_soon_threadsafe(_deliver, loop, events)
            except RuntimeError:  # the loop is closed
                for subscription, _ in events:
                    subscription.cancelled = True
        self._events.clear()


def _deliver(loop: asyncio.AbstractEventLoop, events: Sequence[tuple[Subscription, Event]]) -> None:
    for subscription, event in events:
        # One callback each: an exception in one sink must not cost the other requests their tokens.
        loop.call_soon(subscription.deliver, event)
