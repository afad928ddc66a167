"""The database under the serving state: SQLite in the project's folder, or PostgreSQL that several machines share."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, create_engine, event, extract, func, insert, inspect, make_url, select
from sqlalchemy.exc import ArgumentError, DatabaseError, DataError, IntegrityError, NoSuchModuleError

from tunewright.core.errors import UserError
from tunewright.core.io import write_text, writing
from tunewright.serving.state.tables import SCHEMA_VERSION, audit_head, metadata, schema

BUSY_SECONDS = 10
"""How long a writer waits for others: each holds SQLite for well under a millisecond."""

_OURS = 7_263_148_051  # the number of the lock that makes the tables, among PostgreSQL's advisory locks
_WRITES = "tunewright_writes"


class StateUnavailableError(UserError):
    """The database does not answer, or refuses: nothing has been changed."""


class Database:
    """Connections to the state, in transactions that are whole or nothing.

    Args:
        url: ``sqlite:///FILE`` or ``postgresql://…``.
        clock: seconds since 1970, in place of the database's own clock (tests).

    Raises:
        UserError: no such kind of database, one that cannot be reached, or of a newer tunewright.
    """

    def __init__(self, url: str, clock: Callable[[], float] | None = None) -> None:
        self._url = _checked(url)
        self.name = self._url.render_as_string(hide_password=True)
        self._clock = clock
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            _make_folder(Path(str(self._url.database)))
            self._engine = create_engine(self._url, connect_args={"timeout": BUSY_SECONDS})
            event.listen(self._engine, "connect", _on_sqlite_connect)
            event.listen(self._engine, "begin", _on_sqlite_begin)
        else:
            try:
                # A connection that the server has closed meanwhile is found before it is used.
                self._engine = create_engine(self._url, pool_pre_ping=True)
            except ModuleNotFoundError:
                fix = 'Install it: pip install "tunewright[postgresql]"'
                raise UserError("PostgreSQL's driver psycopg is not installed", where=self.name, fix=fix) from None
        try:
            self._make_or_check()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state and changes nothing.

        Raises:
            StateUnavailableError: the database does not answer.
        """
        with self._told(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is kept at the end, unless something is raised.

        Raises:
            StateUnavailableError: the database does not answer, or cannot be written to.
        """
        with (
            self._told(),
            self._engine.connect().execution_options(**{_WRITES: True}) as connection,
            connection.begin(),
        ):
            yield connection

    def now(self, connection: Connection) -> float:
        """Seconds since 1970: one clock for all servers on this database."""
        if self._clock is not None:
            return self._clock()
        if self.is_sqlite:
            return time.time()
        told = connection.execute(select(extract("epoch", func.clock_timestamp()))).scalar_one()
        return float(told)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, DataError):
            raise  # it does answer: we have asked for what cannot be
        except DatabaseError as error:
            raise StateUnavailableError(
                f"the serving state does not answer: {' '.join(str(error.orig).split())}", where=self.name
            ) from error

    def _make_or_check(self) -> None:
        with self.writing() as connection:
            if not self.is_sqlite:
                connection.execute(select(func.pg_advisory_xact_lock(_OURS)))
            if inspect(connection).has_table(schema.name):
                self._require_version(connection)
                return
            foreign = sorted(set(inspect(connection).get_table_names()) & set(metadata.tables))
            if foreign:
                raise UserError(
                    f"there are other tables of the names {', '.join(foreign)} here",
                    where=self.name,
                    fix="Give the serving state a database, or a schema, of its own.",
                )
            metadata.create_all(connection, checkfirst=False)
            connection.execute(insert(schema).values(version=SCHEMA_VERSION))
            connection.execute(insert(audit_head).values(id=1, number=0, digest=""))

    def _require_version(self, connection: Connection) -> None:
        version = connection.execute(select(schema.c.version)).scalar_one()
        if version > SCHEMA_VERSION:
            raise UserError(
                f"the serving state is of schema {version}; this tunewright knows schema {SCHEMA_VERSION}",
                where=self.name,
                fix="Use the tunewright that made it, or a newer one.",
            )


def is_made(url: str) -> bool:
    """Return whether SQLite's file is there; of a server's database, True.

    Raises:
        UserError: no such kind of database.
    """
    parsed = _checked(url)
    return parsed.get_backend_name() != "sqlite" or Path(str(parsed.database)).exists()


def _checked(url: str) -> URL:
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError) as error:
        raise UserError(f"{url!r} is no database's URL: {error}", where="serve.database_url") from None
    if backend == "sqlite" and parsed.database:
        return parsed.set(drivername="sqlite")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise UserError(
        f"{backend} is no database that the state can be in",
        where="serve.database_url",
        fix="Write postgresql://USER@HOST/DATABASE, or sqlite:///FILE.",
    )


def _make_folder(path: Path) -> None:
    """Make SQLite's file, readable by its owner alone, in a folder that git ignores."""
    with writing(path):
        if not path.parent.exists():
            write_text(path.parent / ".gitignore", "*\n")
        if not path.exists():
            path.touch(mode=0o600)


def _on_sqlite_connect(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins no transaction by itself
    # Readers go on while one writes. A commit survives the process's death at once, the machine's at the next
    # checkpoint: what is lost then is lost whole, the audit's line with the change that it tells of.
    _keep_a_log_ahead(connection)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _keep_a_log_ahead(connection: Any) -> None:
    """Write ahead (WAL). In a new file this alone does not wait for others that open it, but fails at once."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            # SQLite's kinds of "busy" are in the higher bits.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.005)


def _on_sqlite_begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    # IMMEDIATE: a transaction that only starts to write after it has read may find that it can't, and fail.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def ceil_seconds(seconds: float) -> int:
    """Whole seconds to wait, at least 1."""
    return max(1, math.ceil(seconds))
