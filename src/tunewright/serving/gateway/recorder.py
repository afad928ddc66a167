"""Records answered requests in the background: redacts, encrypts and stores them; no answer waits for it.

    put() in the event loop: sample -> bounded queue -> one thread: redact -> encrypt -> store

What cannot be recorded is dropped and counted: the queue or the disk is full, the database is locked, or the key file
is wrong. Personal data and secrets are replaced before anything is written.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from tunewright.core.errors import UserError
from tunewright.data.pii import redact_value
from tunewright.serving.gateway.schemas import RequestBody
from tunewright.serving.tenants import State
from tunewright.serving.tenants.record_keys import KeyFile, RecordKeys
from tunewright.serving.tenants.records import NewRecord, UnitKind, is_sampled, unit_of
from tunewright.serving.tenants.tenants import Caller

log = logging.getLogger("tunewright")

MAX_WAITING = 256
"""Answered requests that wait for their record; further ones are dropped."""
MAX_BYTES = 1 << 20
"""The largest body that is recorded: the search for personal data takes up to half a second for it."""
CLOSE_SECONDS = 5.0
"""The time for the last records of a server that ends."""
_AT_ONCE = 32
"""Records of one transaction."""
_FLUSH_SECONDS = 2.0
_LABELS = ("user", "safety_identifier", "metadata", "prompt_cache_key")
"""Fields that name the end user, and change no answer."""


@dataclass(frozen=True)
class Received:
    """A request as the client sent it."""

    path: str
    raw: bytes
    body: RequestBody
    """The same, as a chat or completion request."""


@dataclass(frozen=True)
class _Waiting:
    """An answered request that waits for its record."""

    caller: Caller
    keys: RecordKeys
    number: int
    unit: str
    unit_kind: UnitKind
    subject: str | None
    received: Received
    answers: Sequence[dict[str, Any]]


class Recorder:
    """Records the requests of tenants that are recorded; it works from the start to :meth:`close`."""

    def __init__(self, state: State, file: KeyFile) -> None:
        self._state = state
        self._file = file
        self._queue: Queue[_Waiting | None] = Queue(MAX_WAITING)
        self._counting = threading.Lock()
        self._written = Counter[str]()
        self._dropped = Counter[str]()
        self._unsaved = Counter[int]()
        """Dropped requests by the tenant's id, which the state does not have yet."""
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="tunewright-recorder", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """The written and the dropped records of this server by tenant; safe to read from any thread."""
        with self._counting:
            return dict(self._written), dict(self._dropped)

    def put(
        self, caller: Caller, number: int, response_id: str, received: Received, answers: Sequence[dict[str, Any]]
    ) -> None:
        """Record an answered request, if its unit is sampled; never waits."""
        assert caller.record_share is not None
        try:
            keys = self._file.keys(caller.tenant, caller.record_key)
        except UserError as error:
            self._drop([caller], str(error))
            return
        body = received.body
        unit, kind, subject = unit_of(keys, body.end_user, body.beginning, response_id)
        if not is_sampled(unit, caller.record_share):
            return
        if len(received.raw) > MAX_BYTES:
            self._drop([caller], f"A body has over {MAX_BYTES:,} bytes")
            return
        try:
            self._queue.put_nowait(_Waiting(caller, keys, number, unit, kind, subject, received, answers))
        except Full:
            self._drop([caller], f"{MAX_WAITING} requests wait for their record")

    def close(self) -> None:
        """Write the waiting records; what takes longer than `CLOSE_SECONDS` is lost."""
        with suppress(Full):
            self._queue.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)
        if lost := self._queue.qsize():
            log.warning("%d requests were not recorded: the server ended", lost)

    def _run(self) -> None:
        ended = False
        while not ended:
            batch: list[_Waiting] = []
            with suppress(Empty):
                item = self._queue.get(timeout=_FLUSH_SECONDS)
                while item is not None:
                    batch.append(item)
                    if len(batch) == _AT_ONCE:
                        break
                    item = self._queue.get_nowait()
                ended = item is None
            if batch or self._unsaved:
                self._write(batch)

    def _write(self, batch: Sequence[_Waiting]) -> None:
        new = []
        for each in batch:
            try:
                new.append((each.caller, _record(each)))
            except (RecursionError, ValueError) as error:  # lists within lists, too deep for Python
                self._drop([each.caller], f"A body cannot be searched for personal data ({type(error).__name__})")
        with self._counting:
            unsaved = self._unsaved.copy()
        try:
            self._state.records.write([record for _, record in new], unsaved)
        except (UserError, SQLAlchemyError) as error:
            self._drop([caller for caller, _ in new], str(error))
            return
        with self._counting:
            self._unsaved -= unsaved
            self._written.update(caller.tenant for caller, _ in new)
        if new:
            self._warned.clear()

    def _drop(self, callers: Sequence[Caller], why: str) -> None:
        """Count requests as not recorded, and warn once of each reason until a record is written."""
        if not callers:
            return
        with self._counting:
            self._dropped.update(caller.tenant for caller in callers)
            self._unsaved.update(caller.tenant_id for caller in callers)
            new = why not in self._warned
            self._warned.add(why)
        if new:
            log.warning("%s: requests are answered and not recorded; `tunewright tenant records` counts them", why)


def _record(each: _Waiting) -> NewRecord:
    """Return the record of a request, redacted and encrypted."""
    sent = json.loads(each.received.raw)
    request = {name: value for name, value in sent.items() if name not in _LABELS}
    document: dict[str, Any]
    document, redacted = redact_value(
        {"request": request, "answers": list(each.answers)},
        lambda kind, value: each.keys.placeholder(each.unit, kind, value),
    )
    body = each.keys.encrypt({"path": each.received.path, **document, "redacted": redacted}, each.number)
    assert each.caller.record_share is not None
    return NewRecord(each.number, each.unit, each.unit_kind, each.subject, each.caller.record_share, body)
