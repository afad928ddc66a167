"""The engine ``peft``: one thread that owns the model and the running batch, and hands out tokens as they come."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Collection
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tunewright.adapters.lora_weights import read_matrices
from tunewright.adapters.registry import require_digest
from tunewright.core.errors import UserError
from tunewright.engines.protocol import AdapterFailedError, Delta, EngineStoppedError, RequestFailedError
from tunewright.generation.batched_lora import Lora
from tunewright.generation.decoding import Batch, PrefillState, Request, Row, prefill_groups
from tunewright.generation.lora_dispatch import adapters_first
from tunewright.generation.threads import release_cores
from tunewright.serving.engines.outbox import Inbox, Outbox

log = logging.getLogger("tunewright")

PIECE_TOKENS = 256
"""Of a long prompt that are read in one pass: everybody's next token waits for it, and with longer pieces longer."""

HELD_PASSES = 2
"""The most that newcomers to a batch that is nearly full wait, to be read together with further ones."""

_Outcome = Delta | RequestFailedError | EngineStoppedError


class _Ticket:
    """One request's way through the engine; all of it but ``left`` belongs to the engine's thread."""

    def __init__(self, request: Request, whose: str) -> None:
        self.request = request
        self.whose = whose
        self.inbox = Inbox[_Outcome]()
        self.left = False
        """Who asked does not wait for the answer."""
        self.row: Row | None = None
        self._taken = 0

    @property
    def cancelled(self) -> bool:
        return self.left or self.inbox.closed

    @property
    def finished(self) -> bool:
        return self.row is not None and self.row.finish is not None

    def new_tokens(self) -> Delta:
        """Return those that have not been taken from here yet."""
        assert self.row is not None
        new = tuple(self.row.ids[self._taken :])
        self._taken += len(new)
        return Delta(new, self.row.finish)


class PeftEngine:
    """Answers requests for the base and its adapters together, in one batch.

    Adapters are loaded beside the model, which is not changed by it: they are read by another thread, and to have one
    more takes the engine's own thread about a millisecond between two passes (docs/decisions/0024).

    Args:
        model: a base; from here on only this engine may use it. Or a PeftModel, whose own adapters can then be asked
            for by their names, and no others: see :class:`tunewright.generation.decoding.Batch`.
        stop_ids, pad_id: see :class:`tunewright.generation.decoding.Batch`.
        max_batch: the most rows that decode at once; further requests wait in the order of their arrival.
        context_length: the most tokens that prompt and answer may have together.

    Raises:
        UserError: an adapter is of a kind that cannot share a batch.
    """

    name = "peft"

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Collection[int],
        pad_id: int,
        max_batch: int,
        context_length: int,
    ) -> None:
        assert max_batch >= 1
        self.max_batch = max_batch
        self.context_length = context_length
        self._model = model
        self._loaded: set[str] = set(getattr(model, "peft_config", ()))
        self._batch = Batch(model, stop_ids=stop_ids, pad_id=pad_id)
        self._changed = threading.Condition()
        self._errands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._waiting: deque[_Ticket] = deque()
        self._running: list[_Ticket] = []
        self._unread: dict[_Ticket, PrefillState] = {}
        self._held = 0
        self._outbox = Outbox[_Outcome]()
        self._stopped: str | None = None
        release_cores()  # whoever loaded the model has computed with them
        self._thread = threading.Thread(target=self._run, name="tunewright-engine", daemon=True)
        self._thread.start()

    @property
    def stopped(self) -> str | None:
        """Why the engine answers nothing any more, or None while it does."""
        return self._stopped

    @property
    def dead(self) -> bool:
        """True if it has stopped: it does not start again."""
        return self._stopped is not None

    @property
    def under_way(self) -> tuple[int, int]:
        """Requests that decode now, and requests that wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    async def stream(self, request: Request, *, whose: str = "") -> AsyncGenerator[Delta, None]:
        """Tokens as they come; closing the iterator early (or cancelling its task) takes the request out.

        Nothing is remembered from one request to another: ``whose`` it is decides only when its prompt is read.

        Raises:
            RequestFailedError: this request could not be computed.
            EngineStoppedError: the engine has stopped, before or meanwhile.
        """
        if request.adapter is not None and request.adapter not in self._loaded:
            raise RequestFailedError(f"The adapter {request.adapter} is not loaded.")
        ticket = _Ticket(request, whose)
        self._submit(ticket)
        try:
            while True:
                outcome = await ticket.inbox.come.get()
                if not isinstance(outcome, Delta):
                    raise outcome
                yield outcome
                if outcome.finish:
                    return
        finally:
            self._cancel(ticket)

    async def load(self, digest: str, folder: Path) -> None:
        """Put an adapter beside those that are there; answers under way go on while its weights are read.

        Raises:
            UserError: its files are not those of the digest, or it cannot share a batch.
            AdapterFailedError: it could not be loaded.
            EngineStoppedError: the engine has stopped.
        """
        if digest in self._loaded:
            return

        def read() -> dict[str, Lora]:
            require_digest(folder, digest)
            return read_matrices(folder, self._model)

        try:
            loras = await asyncio.to_thread(read)
        except UserError:
            raise
        except Exception as error:  # as of errands: whoever follows the releases goes on with the others
            log.exception("an adapter could not be read")
            raise AdapterFailedError(f"The adapter {digest} could not be read: {error}") from error

        def put() -> None:
            self._batch.put(digest, loras)
            self._loaded.add(digest)

        await self._between_turns(put)

    async def unload(self, digest: str) -> None:
        """Let an adapter's memory go; no request under way may need it.

        Raises:
            AdapterFailedError: it could not be let go.
            EngineStoppedError: the engine has stopped.
        """

        def let_go() -> None:
            if any(ticket.request.adapter == digest for ticket in self._running):
                raise ValueError(f"an answer under way needs the adapter {digest}")
            self._batch.drop(digest)
            self._loaded.discard(digest)

        await self._between_turns(let_go)

    def stop(self) -> None:
        """Stop at once: what waits or runs gets :class:`EngineStoppedError`. Returns when the thread has ended."""
        with self._changed:
            self._stopped = self._stopped or "The server is shutting down."
            self._changed.notify()
        self._thread.join()

    async def _between_turns(self, errand: Callable[[], None]) -> None:
        """Have the engine's thread, which alone may touch the model, do something while no pass is under way."""
        done: Future[None] = Future()
        with self._changed:
            if self._stopped:
                raise EngineStoppedError(self._stopped)
            self._errands.append((errand, done))
            self._changed.notify()
        await asyncio.wrap_future(done)

    def _submit(self, ticket: _Ticket) -> None:
        with self._changed:
            if self._stopped:
                raise EngineStoppedError(self._stopped)
            self._waiting.append(ticket)
            self._changed.notify()

    def _cancel(self, ticket: _Ticket) -> None:
        with self._changed:
            ticket.left = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            with self._batch.attached():
                while self._wait_for_work():
                    self._turn()
        except Exception as error:
            log.exception("the engine has failed; the server answers 503 from now on")
            with self._changed:
                self._stopped = f"The model failed and the server must be restarted: {error}"
        with self._changed:
            assert self._stopped is not None
            for ticket in (*self._running, *self._waiting):
                self._outbox.put(ticket.inbox, EngineStoppedError(self._stopped))
            self._outbox.send()
            self._running, self._waiting = [], deque()
            for _, done in self._errands:
                if done.set_running_or_notify_cancel():
                    done.set_exception(EngineStoppedError(self._stopped))
            self._errands.clear()

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; False once the engine is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._running or self._waiting or self._errands)
            return self._stopped is None

    def _turn(self) -> None:
        """Do errands, drop who has hung up, let newcomers in, read on, move every row on by one token."""
        self._do_errands()
        with self._changed:
            gone = [ticket for ticket in self._running if ticket.cancelled]
            self._running = [ticket for ticket in self._running if not ticket.cancelled]
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
            newcomers = self._come_in()
            # They count as running from here on: whatever happens now, they hear of it.
            self._running += newcomers
        for ticket in gone:
            self._drop(ticket)
        short = [ticket for ticket in newcomers if len(ticket.request.prompt_ids) <= PIECE_TOKENS]
        first = adapters_first([ticket.request.adapter for ticket in short])
        for group in prefill_groups([len(ticket.request.prompt_ids) for ticket in short]):
            # Rows that need not be put in order for each layer are read sooner.
            self._admit([short[place] for place in sorted(group, key=first.__getitem__)])
        for ticket in newcomers:
            if ticket not in short:
                self._unread[ticket] = self._batch.begin([ticket.request])
        # A piece of the oldest, and one of what has least left: a long prompt holds nobody up, and nobody holds it up.
        least_left = sorted(self._unread, key=lambda ticket: self._unread[ticket].left)
        for ticket in dict.fromkeys([*list(self._unread)[:1], *least_left[:1]]):
            self._read_on(ticket)
        self._let_go_finished()
        self._outbox.send()
        if self._batch.rows:
            self._batch.step()
            for ticket in self._running:
                if ticket not in self._unread:
                    self._outbox.put(ticket.inbox, ticket.new_tokens())
            self._let_go_finished()
            self._outbox.send()

    def _come_in(self) -> list[_Ticket]:
        """Whose prompts are read now."""
        free = self.max_batch - len(self._running)
        if self._held < HELD_PASSES and self._can_wait(free):
            self._held += 1
            return []
        self._held = 0
        return [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]

    def _can_wait(self, free: int) -> bool:
        """Return whether newcomers lose little by being read some passes later, and with others.

        Everybody under way waits for a pass in which prompts are read, and one prompt takes nearly as long as two. So
        who is one of many for few places can wait, and who has more than an even part of the batch already.
        """
        if not self._waiting or not 0 < free < self.max_batch // 4:
            return False
        if free < min(self.max_batch // 8, len(self._waiting)):
            return True
        rows = Counter(ticket.whose for ticket in self._running)
        return all(rows[ticket.whose] > len(self._running) / len(rows) for ticket in self._waiting)

    def _do_errands(self) -> None:
        while self._errands:
            errand, done = self._errands.popleft()
            if not done.set_running_or_notify_cancel():
                continue  # nobody waits for it any more
            try:
                errand()
            except Exception as error:
                log.exception("the adapters could not be changed")
                done.set_exception(AdapterFailedError(f"The engine could not change its adapters: {error}"))
            else:
                done.set_result(None)

    def _admit(self, tickets: list[_Ticket]) -> None:
        """Prefill together; where that fails, one by one, so that only the request at fault fails."""
        try:
            rows = self._batch.admit([ticket.request for ticket in tickets])
        except Exception as error:
            if len(tickets) > 1:
                for ticket in tickets:
                    self._admit([ticket])
                return
            log.exception("a request could not be computed")
            self._fail(tickets[0], error)
            return
        for ticket, row in zip(tickets, rows, strict=True):
            ticket.row = row
            self._outbox.put(ticket.inbox, ticket.new_tokens())

    def _read_on(self, ticket: _Ticket) -> None:
        """Read a piece of a long prompt; after the last one its row decodes with the others."""
        reading = self._unread[ticket]
        try:
            if not self._batch.read(reading, PIECE_TOKENS):
                return
        except Exception as error:
            log.exception("a request could not be computed")
            self._fail(ticket, error)
        else:
            (ticket.row,) = reading.rows
            self._outbox.put(ticket.inbox, ticket.new_tokens())
        del self._unread[ticket]

    def _fail(self, ticket: _Ticket, error: Exception) -> None:
        with self._changed:
            self._running.remove(ticket)
        self._outbox.put(ticket.inbox, RequestFailedError(f"The model could not compute this request: {error}"))

    def _drop(self, ticket: _Ticket) -> None:
        self._unread.pop(ticket, None)
        if ticket.row is not None:
            self._batch.cancel(ticket.row)

    def _let_go_finished(self) -> None:
        with self._changed:
            self._running = [ticket for ticket in self._running if not ticket.finished]
