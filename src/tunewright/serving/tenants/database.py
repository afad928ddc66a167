"""The database of the serving state: SQLite in the project's folder, or PostgreSQL shared by several machines."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import URL, Connection, create_engine, event, extract, func, insert, inspect, make_url, select, update
from sqlalchemy.exc import ArgumentError, DatabaseError, DataError, IntegrityError, NoSuchModuleError

from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.core.io import write_text, writing
from tunewright.serving.tenants.tables import (
    SCHEMA_VERSION,
    audit_head,
    metadata,
    requests_by_response_id,
    schema,
    shadow_units,
)

BUSY_SECONDS = 10
"""Timeout of a writer that waits for others, each of which locks SQLite for well under a millisecond."""
ANSWER_SECONDS = 5.0
"""A server's limit for each answer of the database; nobody waits for later answers."""

# A frozen or unreachable machine is detected by TCP, even by commands that wait for a long statement.
_CONNECTION = {
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
_LOCK_TIMEOUT = f"-c lock_timeout={BUSY_SECONDS * 1000}"
# PostgreSQL itself ends a slow statement first, so that only a hung one costs the connection.
_STATEMENT_TIMEOUT = f"-c statement_timeout={int(ANSWER_SECONDS * 800)}"

_SCHEMA_LOCK = 7_263_148_051  # an arbitrary number among PostgreSQL's advisory locks
_WRITES = "tunewright_writes"

_SETTING = "--database-url or serve.database_url"
_URLS = "Use postgresql://USER@HOST/DATABASE or sqlite:///FILE."


class StateUnavailableError(UserError):
    """The database does not answer or refuses; nothing was changed."""


class Database:
    """Connections to the state, in atomic transactions."""

    def __init__(
        self,
        url: str,
        clock: Callable[[], float] | None = None,
        steady: Callable[[], float] | None = None,
        *,
        serving: bool = False,
    ) -> None:
        self._url = _checked(url)
        self.name = self._url.render_as_string(hide_password=True)
        self._clock = clock
        self.steady = steady or clock or time.monotonic
        self._ahead: float | None = None
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        self._path = Path(str(self._url.database))
        if self.is_sqlite:
            _make_folder(self._path)
            self._file = self._found_file()
            self._engine = create_engine(self._url, connect_args={"timeout": BUSY_SECONDS})
            event.listen(self._engine, "connect", _on_sqlite_connect)
            event.listen(self._engine, "begin", _on_sqlite_begin)
        else:
            try:
                # A connection that the server closed meanwhile is detected before it is used.
                self._engine = create_engine(
                    self._url, pool_pre_ping=True, connect_args=_connect_args(self._url, serving=serving)
                )
            except ModuleNotFoundError:
                fix = f"Install it: {install_command('postgresql')}"
                raise UserError("PostgreSQL's driver psycopg is not installed", where=self.name, fix=fix) from None
            if serving:
                connect = lambda _dialect, _record, given, named: _bounded_connection().connect(*given, **named)  # noqa: E731
                event.listen(self._engine, "do_connect", connect)
        try:
            self._create_or_check()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a read-only transaction, which sees one state of the data."""
        self._require_same_file()
        with self._translated_errors(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a transaction, which is committed at the end unless an exception is raised."""
        self._require_same_file()
        with (
            self._translated_errors(),
            self._engine.connect().execution_options(**{_WRITES: True}) as connection,
            connection.begin(),
        ):
            yield connection

    def now(self, connection: Connection) -> float:
        """Return seconds since 1970, by one clock for all servers on this database."""
        if self._clock is not None:
            return self._clock()
        if self.is_sqlite:
            return time.time()
        seconds = connection.execute(select(extract("epoch", func.clock_timestamp()))).scalar_one()
        return float(seconds)

    def damage(self) -> list[str]:
        """Return what SQLite finds wrong with its file: pages, order, indexes and constraints.

        PostgreSQL checks its pages itself, if it was set up with ``initdb --data-checksums``.
        """
        if not self.is_sqlite:
            return []
        found = []
        with self.reading() as connection:
            try:
                for line in connection.exec_driver_sql("PRAGMA integrity_check").scalars():
                    found.append(str(line))
            except DatabaseError as error:
                if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_CORRUPT:
                    raise
                found.append(str(error.orig))
        return [] if found == ["ok"] else found

    def not_before(self, now: float) -> float:
        """Return the later of ``now`` and the time by this process's own count since it opened the state.

        A clock that moves back then makes no expired key valid. A clock that was ahead does no lasting harm.
        """
        ahead = now - self.steady()
        if self._ahead is None:
            self._ahead = ahead
        return now + max(0.0, self._ahead - ahead)

    def not_after(self, now: float) -> float:
        """Return the earlier of ``now`` and the time by this process's own count since it opened the state.

        A clock that moves forward then expires nothing early. The time in which the machine was suspended is not
        counted.
        """
        assert self._ahead is not None, "it is set when the state is opened"
        return now + min(0.0, self._ahead - (now - self.steady()))

    def scrub(self) -> bool:
        """Write SQLite's log into its file and empty it: deleted text is in neither then. False: others read from it.

        PostgreSQL decides itself when the bytes of deleted rows leave its files.
        """
        if not self.is_sqlite:
            return True
        with self._translated_errors(), closing(self._engine.raw_connection()) as connection:
            busy, *_ = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _found_file(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _require_same_file(self) -> None:
        """Check that SQLite's open file is still the one at its path.

        A replaced file is not opened in place of the old one: the write-ahead log belongs to the old file, and numbers
        of requests in progress would settle other requests.
        """
        if not self.is_sqlite or (found := self._found_file()) == self._file:
            return
        path = self._path.name
        raise StateUnavailableError(
            f"The file of the serving state was {'deleted' if found is None else 'replaced'} while it was in use",
            where=self.name,
            fix=f"Stop the server, put the right file there, remove {path}-wal and {path}-shm, and start the server.",
        )

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, DataError):
            raise  # the database answers, and the statement is wrong
        except json.JSONDecodeError as error:
            raise StateUnavailableError(f"The serving state has a damaged value: {error}", where=self.name) from error
        except DatabaseError as error:
            if self.is_sqlite:
                # Where a file can't be opened for writing, SQLite opens it for reading, and keeps it so: the index
                # of its write-ahead log even until the process has closed all connections. Connections in use
                # return to this pool; Engine.dispose() would make another pool and leave them open in the old one.
                self._engine.pool.dispose()
            raise StateUnavailableError(
                f"The serving state is unavailable: {' '.join(str(error.orig).split())}", where=self.name
            ) from error

    def _create_or_check(self) -> None:
        with self.writing() as connection:
            self.not_before(self.now(connection))
            if not self.is_sqlite:
                connection.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
            if inspect(connection).has_table(schema.name):
                version = connection.execute(select(schema.c.version)).scalar_one()
                if version in (6, 7, 8, 9):
                    if version == 8:
                        connection.exec_driver_sql("ALTER TABLE shadow_reviews ADD COLUMN judge JSON")
                        for added in ("labels INTEGER", "confirmed DOUBLE PRECISION", "squares DOUBLE PRECISION"):
                            connection.exec_driver_sql(
                                f"ALTER TABLE shadow_units ADD COLUMN {added} DEFAULT 0 NOT NULL"
                            )
                        connection.execute(update(shadow_units).values(labels=shadow_units.c.differing))
                    if version == 6:
                        connection.exec_driver_sql("ALTER TABLE requests ADD COLUMN response_id VARCHAR(64)")
                        requests_by_response_id.create(connection)
                    if version < 8:
                        connection.exec_driver_sql("ALTER TABLE releases ADD COLUMN shadow JSON")
                    if version in (8, 9):
                        connection.exec_driver_sql(
                            "ALTER TABLE shadow_reviews ADD COLUMN spent DOUBLE PRECISION DEFAULT 0 NOT NULL"
                        )
                    if version == 9:
                        connection.exec_driver_sql(
                            "UPDATE shadow_reviews SET spent = (SELECT COALESCE(SUM(cost), 0) FROM shadow_judgements "
                            "WHERE shadow_judgements.release_id = shadow_reviews.release_id)"
                        )
                        connection.exec_driver_sql("ALTER TABLE shadow_judgements DROP COLUMN cost")
                    metadata.create_all(connection)  # the missing tables
                    connection.execute(update(schema).values(version=SCHEMA_VERSION))
                    log.warning("the serving state was upgraded to schema %d; earlier builds refuse it", SCHEMA_VERSION)
                elif version != SCHEMA_VERSION:
                    raise UserError(
                        f"The serving state has schema {version}, and this tunewright supports schema {SCHEMA_VERSION}",
                        where=self.name,
                        fix="Use the tunewright version that created it.",
                    )
                return
            foreign = sorted(set(inspect(connection).get_table_names()) & set(metadata.tables))
            if foreign:
                raise UserError(
                    f"The database has other tables with the names {', '.join(foreign)}",
                    where=self.name,
                    fix="Use a separate database or schema for the serving state.",
                )
            metadata.create_all(connection, checkfirst=False)
            connection.execute(insert(schema).values(version=SCHEMA_VERSION))
            connection.execute(insert(audit_head).values(id=1, number=0, digest=""))


def exists(url: str) -> bool:
    """Return whether SQLite's file exists; True for PostgreSQL."""
    parsed = _checked(url)
    return parsed.get_backend_name() != "sqlite" or Path(str(parsed.database)).exists()


def _checked(url: str) -> URL:
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError) as error:
        raise UserError(f"Invalid database URL {url!r}: {error}", where=_SETTING, fix=_URLS) from None
    if backend == "sqlite" and parsed.database:
        return parsed.set(drivername="sqlite")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise UserError(
        f"Unsupported database {backend}",
        where=_SETTING,
        fix=_URLS,
    )


def _connect_args(url: URL, *, serving: bool) -> dict[str, Any]:
    """Return PostgreSQL's timeouts; timeouts in the URL take precedence."""
    own = url.query.get("options", ())
    options = [_LOCK_TIMEOUT, *([_STATEMENT_TIMEOUT] if serving else ()), *((own,) if isinstance(own, str) else own)]
    timeouts = {name: value for name, value in _CONNECTION.items() if name not in url.query}
    return {**timeouts, "options": " ".join(options)}


@cache
def _bounded_connection() -> Any:
    """Return a class of connections to PostgreSQL that fail if there is no answer within `ANSWER_SECONDS`.

    PostgreSQL's own timeouts do not run while it is frozen, nor do TCP's: its kernel confirms packets.
    """
    import psycopg

    class Bounded(psycopg.Connection[Any]):
        def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            limit = ANSWER_SECONDS if timeout is None else timeout
            begun = time.monotonic()
            try:
                return super().wait(gen, interval, limit)
            except psycopg.OperationalError:
                if time.monotonic() - begun >= limit:
                    self.pgconn.finish()  # or a rollback would wait again
                raise

    return Bounded


def _make_folder(path: Path) -> None:
    """Create SQLite's file, readable by its owner only, in a folder that git ignores."""
    with writing(path):
        if not path.parent.exists():
            write_text(path.parent / ".gitignore", "*\n")
        if not path.exists():
            path.touch(mode=0o600)


def _on_sqlite_connect(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself
    # With write-ahead logging readers do not wait for a writer. A commit survives a crash of the process immediately,
    # and a crash of the machine from the next checkpoint on. Until then a change is lost together with its audit line.
    _set_wal(connection)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")
    # On every connection: bytes that moved to another page would otherwise stay in the old one.
    connection.execute("PRAGMA secure_delete=ON")


def _set_wal(connection: Any) -> None:
    """Turn write-ahead logging on.

    On a new file this statement ignores the busy timeout: while another process opens the file, it fails at once.
    """
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            # The higher bits distinguish kinds of "busy".
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.005)


def _on_sqlite_begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    # IMMEDIATE: a transaction that reads first and writes later may fail at its first write.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def ceil_seconds(seconds: float) -> int:
    """Return the seconds to wait as a whole number, at least 1."""
    return max(1, math.ceil(seconds))


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def iso(seconds: float | None) -> str | None:
    """Return seconds since 1970 as ISO 8601 in UTC; None stays None."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def duration(text: str, where: str) -> float:
    """Return the seconds of a duration like 30d, 12h, 90m or 45s."""
    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", text)
    if match is None:
        raise UserError(f"Invalid duration {text!r}", where=where, fix="Use a duration like 30d, 12h, 90m or 45s.")
    return float(int(match[1]) * _UNITS[match[2]])


def parse_time(text: str, where: str) -> float:
    """Return seconds since 1970 of a date or time in ISO 8601, in UTC unless it names a zone."""
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"Invalid date {text!r}", where=where, fix="Use a date like 2026-11-25.") from None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()


log = logging.getLogger("tunewright")

CLOSE_SECONDS = 10.0
"""The time for the last writes of a server that ends."""

P = ParamSpec("P")
T = TypeVar("T")


class AsyncState:
    """Threads in which the state is read and written."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # SQLite has one writer at a time: more threads would only wait for each other.
        self._threads = ThreadPoolExecutor(1 if database.is_sqlite else 8, thread_name_prefix="tunewright-state")
        # PostgreSQL's reads wait for no lock, and so must not wait for threads that do.
        self._readers = (
            self._threads if database.is_sqlite else ThreadPoolExecutor(4, thread_name_prefix="tunewright-read")
        )
        self._unwritten: deque[Callable[[], None]] = deque()

    async def read(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function that only reads.

        An SQLite read waits for no writer and takes less time than a change of threads, so it runs in the event loop.
        """
        if self._database.is_sqlite:
            return function(*arguments)
        return await self.answer(self._readers.submit(function, *arguments))

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def submit(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> Future[T]:
        """Start a call in a thread; it runs even if the coroutine that waits for it is cancelled."""
        return self._threads.submit(function, *arguments, **named)

    async def answer(self, call: Future[T]) -> T:
        """Wait for a call; if its time is over, it is cancelled unless it has begun."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await asyncio.wrap_future(call)
        except TimeoutError:
            raise StateUnavailableError(
                f"The serving state did not answer within {ANSWER_SECONDS:g} s", where=self._database.name
            ) from None

    def write_later(self, write: Callable[[], None]) -> None:
        """Write in the background; if the database does not answer, :meth:`flush` tries again."""

        def attempt() -> None:
            try:
                write()
            except StateUnavailableError as error:
                log.warning("usage cannot be written now and will be retried: %s", error)
                self._unwritten.append(write)

        def keep(attempted: Future[None]) -> None:
            if attempted.cancelled():
                self._unwritten.append(write)
            elif (error := attempted.exception()) is not None:
                log.error("a record of usage or of a shadow answer was refused and is lost", exc_info=error)

        self._threads.submit(attempt).add_done_callback(keep)

    async def flush(self) -> None:
        """Repeat the writes that failed."""
        while self._unwritten:
            # Removed only once it is written: a server that ends cancels this, and writes the rest in `close`. Each of
            # these writes may be repeated.
            await self.call(self._unwritten[0])
            self._unwritten.popleft()

    def close(self, last: Callable[[], None]) -> None:
        """Finish all writes, then the last one, and close the state; what takes longer than `CLOSE_SECONDS` is lost."""

        def finish() -> None:
            with suppress(StateUnavailableError):
                while self._unwritten:
                    self._unwritten[0]()
                    self._unwritten.popleft()
                last()

        with suppress(TimeoutError):
            self._threads.submit(finish).result(CLOSE_SECONDS)
        for threads in (self._readers, self._threads):
            threads.shutdown(cancel_futures=True)
        if self._unwritten:
            lost = len(self._unwritten)
            log.warning("%d records of usage or shadow answers were lost: the state was unavailable", lost)
        self._database.close()
