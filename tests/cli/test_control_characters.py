"""Control characters in data, file names, keys and arguments never reach the terminal."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from making.command_line import pairs, tunewright, write_jsonl
from making.terminal import Terminal
from tunewright.cli.console import Session, plain_text
from tunewright.core.text import visible

HOSTILE = "\x1b]0;pwned\x07\x1b[2J\u202e\x9b31m\x7f\u2066"
SHOWN = r"\u001b]0;pwned\u0007\u001b[2J\u202e\u009b31m\u007f\u2066"
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _controls(text: str) -> set[str]:
    return {each for each in text if unicodedata.category(each) in ("Cc", "Cs") or each in BIDI} - {"\n", "\t"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tunewright.yaml").write_text("base_model: none\n")
    return tmp_path


@given(st.text(st.one_of(st.characters(), st.sampled_from([*map(chr, range(0xA0)), *BIDI]))))
def test_visible_leaves_no_control_characters_and_nothing_else_changes(text: str) -> None:
    shown = visible(text)
    assert _controls(shown.replace("\r\n", "\n")) == set()
    assert re.sub(r"\\u([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), shown) == text or "\\u" in text
    assert visible(shown) == shown


def test_column_name_of_a_table_is_shown_escaped(project: Path) -> None:
    rows = "".join(f'"{pair["prompt"]}","{pair["completion"]}",""\n' for pair in pairs(60))
    (project / "rows.csv").write_text(f'prompt,completion,"{HOSTILE}"\n{rows.replace(chr(34) * 2, "x" * 2000)}')
    ran = tunewright("data", "check", project / "rows.csv", "-p", project)
    assert SHOWN in ran.stderr + ran.stdout
    assert _controls(ran.stderr + ran.stdout) == set()


def test_file_name_is_shown_escaped(project: Path) -> None:
    for name in (f"{HOSTILE}.jsonl", f"gone{HOSTILE}"):
        path = project / name
        if "gone" not in name:
            write_jsonl(path, [{"prompt": "a"}])
        for options in ((), ("--json",)):
            ran = tunewright("data", "add", path, "-p", project, *options)
            assert ran.code == 2
            assert SHOWN in ran.stderr + ran.stdout
            assert _controls(ran.stderr + ran.stdout) == set()
            if options:
                error = json.loads(ran.stdout)["error"]
                assert HOSTILE in f"{error['where']} {error['what']}"


def test_key_of_the_config_is_shown_escaped(project: Path) -> None:
    key = "".join(f"\\u{ord(each):04x}" for each in HOSTILE)
    (project / "tunewright.yaml").write_text(f'base_model: none\n"{key}": 1\n')
    ran = tunewright("data", "log", "-p", project)
    assert (ran.code, SHOWN in ran.stderr, _controls(ran.stderr)) == (2, True, set())


def test_unknown_option_is_shown_escaped() -> None:
    for arguments in (("data", "add", f"--{HOSTILE}"), (f"--{HOSTILE}",), (f"{HOSTILE}",)):
        ran = tunewright(*arguments)
        assert (ran.code, _controls(ran.stderr)) == (2, set())
        assert "1b]0;pwned" in ran.stderr


def test_result_has_no_control_characters_on_a_terminal_and_in_a_pipe(project: Path) -> None:
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE, "red"))
    assert plain_text(table).count(SHOWN) == 3
    assert plain_text(table).count(SHOWN.replace(r"\u0007", "")) == 1  # rich drops a bell from its own texts
    assert _controls(plain_text(table) + plain_text(HOSTILE)) == set()
    write_jsonl(project / "rows.jsonl", [{"prompt": "a", "completion": HOSTILE, "b": 1}])
    terminal = Terminal("data", "check", project / f"rows.jsonl{HOSTILE}", "-p", project)
    terminal.wait_for("pwned")
    assert terminal.code() == 2
    styles = re.sub(r"\x1b\[[0-9;]*m", "", terminal.screen).replace("\r\n", "\n")
    assert r"\u001b]0;pwned" in styles.replace("\n", "")
    assert _controls(styles) == set()


def test_log_line_is_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    Session(as_json=False)
    assert logging.lastResort is not None
    line = logging.lastResort.format(logging.makeLogRecord({"msg": "alias %s", "args": (HOSTILE,)}))
    assert line == f"alias {SHOWN}"
