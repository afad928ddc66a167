"""Advice with commands on a page: the page that does the same, and the command last."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
import typer

from tunewright.cli import commands
from tunewright.studio.pages import HANDLERS
from tunewright.studio.words import (
    _PAGES,
    Advice,
    advice,
    note,
)


@pytest.mark.parametrize(
    ("fix", "expected"),
    [
        (None, Advice("", None, "")),
        ("Go back and choose one.", Advice("Go back and choose one.", None, "")),
        ("Create one: tunewright data add FILE", Advice("", ("/data", "Data"), "Create one: tunewright data add FILE")),
        (
            "Delete the rows. Or correct them in `tunewright data review`.",
            Advice("Delete the rows.", ("/review", "Review"), "Or correct them in `tunewright data review`."),
        ),
        ("Use --restore to add them.", Advice("", None, "Use --restore to add them.")),
        ("Set data.split_by: input.", Advice("", None, "", "Set data.split_by: input.", "data.split_by")),
        (
            "Add pairs. Set train.epochs lower. Or pass --force.",
            Advice("Add pairs.", None, "Or pass --force.", "Set train.epochs lower.", "train.epochs"),
        ),
        ("Look at data.csv and train.py.", Advice("Look at data.csv and train.py.", None, "")),
        ("Trust it: tunewright keys trust ann", Advice("", None, "Trust it: tunewright keys trust ann")),
    ],
)
def test_commands_and_options_stand_behind_the_page_that_does_the_same(fix: str | None, expected: Advice) -> None:
    assert advice(fix) == expected


def test_first_sentence_of_a_message_stays_first_although_it_names_a_command() -> None:
    message = "12 pairs: `tunewright train` requires --force. Add pairs. Use --force to train."
    assert note(message) == Advice(
        "12 pairs: `tunewright train` requires --force. Add pairs.", None, "Use --force to train."
    )


def test_each_command_exists_and_so_does_its_page() -> None:
    group = typer.main.get_command(commands())
    paths = {path for (method, path), _ in HANDLERS if method == "GET"}
    for words, (path, _) in _PAGES.items():
        command = group
        for word in words.split():
            command = command.commands[word]  # type: ignore[attr-defined]
        assert path in paths or path == "/review/suspects"


def test_no_template_names_a_command_outside_of_a_terminal_line() -> None:
    templates = files("tunewright.studio") / "templates"
    named = []
    for file in sorted(templates.iterdir(), key=lambda each: each.name):
        for line in file.read_text(encoding="utf-8").splitlines():
            if re.search("tunewright [a-z]", line) and not re.search("terminal|studio</code> opens", line):
                named.append(f"{file.name}: {line}")
    assert named == []
