"""Commands, options and messages that docs/ mentions exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import typer.main

from tunewright.cli import commands

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@cache
def _command_line() -> Any:
    return typer.main.get_command(commands())


def _shown_commands(page: str) -> Iterator[str]:
    """Yield every command of tunewright in a page's shell blocks and code spans."""
    for language, block in FENCE.findall(page):
        if language == "sh":
            yield from re.findall(r"^(?:\w+=\$\()?(tunewright .*)", block, re.MULTILINE)
        if language == "console":
            yield from re.findall(r"^\$ (tunewright .*)", block, re.MULTILINE)
    yield from re.findall(r"`(tunewright [^`]+)`", FENCE.sub("", page))


def _unknown(shown: str) -> str | None:
    """Return the first word of a shown command that the command line does not have."""
    words = shlex.split(shown.rstrip(")"), comments=True)[1:]
    ends = [place for place, word in enumerate(words) if word in ("|", "||", ">", "&&")]
    words = words[: ends[0]] if ends else words
    command = _command_line()
    while hasattr(command, "commands") and words and not words[0].startswith(("-", "…")):
        if (command := command.get_command(None, words[0])) is None:
            return words[0]
        words.pop(0)
    options = {"--help", *(option for each in command.params for option in (*each.opts, *each.secondary_opts))}
    return next((word for word in words if word.startswith("--") and word not in options), None)


def test_documented_commands_and_options_exist() -> None:
    pages = sorted((ROOT / "docs").rglob("*.md"))
    shown = [(page.name, command) for page in pages for command in _shown_commands(page.read_text(encoding="utf-8"))]
    assert len(shown) > 150
    assert [(name, command, word) for name, command in shown if (word := _unknown(command))] == []


def test_unknown_option_of_a_documented_command_is_found() -> None:
    assert _unknown("tunewright data add pairs.jsonl --no-such-option") == "--no-such-option"
    assert _unknown("tunewright data no-such-command") == "no-such-command"


def test_error_index_quotes_messages_of_the_source() -> None:
    page = (ROOT / "docs" / "how-to" / "errors.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    assert len(quoted) > 20
    assert [message for message in quoted if message not in source] == []


def test_pages_that_the_source_names_exist() -> None:
    named = {
        (str(file.relative_to(ROOT)), page)
        for folder in ("src", "benchmarks", "tests")
        for file in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"docs/[\w/-]+(?:\.md)?(?=[^\w/-])", file.read_text(encoding="utf-8"))
        if page.endswith(".md") or page.startswith("docs/decisions/")
    }
    assert len(named) > 15
    assert sorted((file, page) for file, page in named if not list(ROOT.glob(f"{page}*"))) == []
