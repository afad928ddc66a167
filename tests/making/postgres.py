"""A PostgreSQL server of the tests' own: made in a temporary folder, on a Unix socket, gone at the end."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

USER = "tunewright"
_numbers = itertools.count()


def _programs() -> Path | None:
    """The folder of initdb and pg_ctl, which Debian does not put on the PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    return folders[-1] if folders else None


def _runs_as() -> str | None:
    """PostgreSQL refuses to run as root; there, as whom it is to run."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


@contextmanager
def postgres_server() -> Iterator[Path]:
    """A running server's folder, which holds its socket; skips without PostgreSQL, but fails in CI."""
    unavailable = pytest.fail if os.environ.get("CI") else pytest.skip
    programs = _programs()
    if programs is None:
        unavailable("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = _runs_as()
    if os.getuid() == 0 and user is None:
        unavailable("PostgreSQL does not run as root, and there is no other user here")
    folder = Path(tempfile.mkdtemp(prefix="tw-pg-"))  # a socket's path may be no longer than 107 bytes
    if user is not None:
        shutil.chown(folder, user)

    def run(*command: str | Path) -> None:
        done = subprocess.run(
            [str(part) for part in command], user=user, cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr + done.stdout

    data = folder / "data"
    try:
        run(programs / "initdb", "-D", data, "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        run(programs / "pg_ctl", "-D", data, "-w", "-t", "120", "-l", folder / "log", "-o", options, "start")
        try:
            yield folder
        finally:
            run(programs / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_schema(server: Path) -> str:
    """The URL of a schema without tables: as good as a database of its own, and made sooner."""
    name = f"state{next(_numbers)}"
    with psycopg.connect(f"host={server} user={USER} dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
    return f"postgresql://{USER}@/postgres?host={server}&options=-csearch_path%3D{name}"


def restart(server: Path) -> None:
    """Restart a server as after a crash: it ends all connections at once, and recovers from its log."""
    programs = _programs()
    assert programs is not None
    command: list[str | Path] = [
        programs / "pg_ctl",
        "-D",
        server / "data",
        "-w",
        "-t",
        "120",
        "-m",
        "immediate",
        "-l",
        server / "log",
    ]
    options = ["-o", f"-k {server} -c listen_addresses='' -c fsync=off", "restart"]
    subprocess.run([*command, *options], user=_runs_as(), cwd=server, capture_output=True, check=True)


@contextmanager
def frozen(server: Path) -> Iterator[None]:
    """Stop all processes of a server, whose kernel still confirms packets; they continue after the block."""
    first = int((server / "data" / "postmaster.pid").read_text().split()[0])
    os.kill(first, signal.SIGSTOP)  # before its children: it forks none any more
    children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    processes = [first, *map(int, children)]
    for process in processes[1:]:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
