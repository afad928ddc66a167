"""Results on stdout: what `| grep`, `| head` and a terminal get."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from making.command_line import tiny_project, tunewright
from tunewright.cli.console import plain_text

LONG = "a message of many words " * 20


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    folder = tiny_project(tmp_path_factory.mktemp("pipes") / "project", tiny_base_folder)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-m", f"{LONG}[red]end[/]", "-p", folder).code == 0
    return folder


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tunewright", *map(str, arguments)]


# Where COLUMNS is set, rich believes it rather than the terminal.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
ENVIRONMENT |= {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "log"),
        ("data", "show", "pairs.jsonl:3"),
        ("data", "blame", "pairs.jsonl:3"),
        ("data", "trained-by", "pairs.jsonl:3"),
        ("data", "leakage"),
        ("data", "check"),
        ("data", "suspects"),
        ("data", "verify"),
        ("adapters", "list"),
        ("estimate-memory", "--gpu", "24GB"),
        ("access-log",),
        ("config", "show"),
        ("releases",),
        ("tenant", "usage"),
        ("tenant", "list"),
        ("audit", "show"),
    ],
    ids=" ".join,
)
def test_result_is_on_stdout_and_notes_are_on_stderr(project: Path, arguments: tuple[str, ...]) -> None:
    ran = tunewright(*arguments, "-p", project)
    assert ran.code == 0
    assert ran.stdout
    assert "not reviewed" not in ran.stdout
    assert all(line == line.rstrip() for line in ran.stdout.splitlines())


def test_row_of_a_table_is_one_whole_line_in_a_pipe(project: Path) -> None:
    ran = subprocess.run(_command("data", "log", "-p", project), capture_output=True, text=True, env=ENVIRONMENT)
    heading, row = ran.stdout.splitlines()
    assert heading.split()[:5] == ["no.", "version", "created", "(UTC)", "rows"]
    assert row.endswith(f"{LONG}[red]end[/]")
    assert "\x1b" not in ran.stdout + ran.stderr
    assert ran.stderr.startswith("Version ")


def test_plain_text_escapes_line_ends_in_cells() -> None:
    table = Table(title="Two lines\nof a title")
    table.add_column("a")
    table.add_column("b")
    table.add_row("one\ntwo", Text("three\n\nfour"))
    assert plain_text(table) == "Two lines\nof a title\na         b\none\\ntwo  three\\n\\nfour\n"


def test_plain_text_folds_no_column_of_limited_width() -> None:
    table = Table("a")
    table.add_column("by", overflow="fold", max_width=8)
    table.add_row("one", "a long name of an author")
    assert plain_text(table) == "a    by\none  a long name of an author\n"


def test_terminal_gets_boxes_and_its_own_width(project: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    ran = subprocess.run(
        _command("data", "log", "-p", project), stdout=theirs, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    os.close(theirs)
    written = b""
    with suppress(OSError):  # EIO: all has been read
        while part := os.read(ours, 65536):
            written += part
    os.close(ours)
    screen = written.decode()
    assert screen.startswith("┏━")
    assert screen.rstrip().endswith("┘")
    assert all(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) == 200 for line in screen.split("\r\n") if line)
    assert "┃" not in ran.stderr


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_command_exits_quietly_with_141_on_a_closed_pipe(project: Path, closed: str) -> None:
    process = subprocess.Popen(
        _command("data", "log", "-p", project),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    getattr(process, closed).close()
    left = process.stderr if closed == "stdout" else process.stdout
    reported = left.read()
    left.close()
    assert process.wait(300) == 141
    assert "Traceback" not in reported
    assert "Exception ignored" not in reported
