"""The author of a change: the stated name before git's user.name, and in no other thread."""

from __future__ import annotations

import subprocess
from pathlib import Path
from threading import Thread

import pytest

from tunewright.core.author import AUTHOR_VARIABLE, authored_by, stated_author
from tunewright.data.versions.version import current_author


def test_stated_author_precedes_gits_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AUTHOR_VARIABLE, raising=False)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "config", "user.name", "Git Name"], check=True)
    assert current_author(tmp_path) == "Git Name"
    monkeypatch.setenv(AUTHOR_VARIABLE, " Dana \n Weber ")
    assert current_author(tmp_path) == "Dana Weber"
    with authored_by("ada"):
        assert current_author(tmp_path) == "ada"
    assert current_author(tmp_path) == "Dana Weber"
    monkeypatch.setenv(AUTHOR_VARIABLE, " ")
    assert current_author(tmp_path) == "Git Name"


def test_author_of_one_request_is_not_that_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AUTHOR_VARIABLE, raising=False)
    found: list[str | None] = []
    with authored_by("ada"):
        other = Thread(target=lambda: found.append(stated_author()))
        other.start()
        other.join()
        assert stated_author() == "ada"
    assert found == [None] and stated_author() is None
