"""``tunewright.open(".")``: the command line's verbs, from Python."""

from __future__ import annotations

import keyword
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import tunewright
from making.command_line import tiny_project
from making.command_line import tunewright as command
from tunewright.cli import commands
from tunewright.core.errors import UserError
from tunewright.data.options import ReviewOptions
from tunewright.data.preview import Preview

NO_VERBS = {"doctor", "init", "config", "demo", "migrate", "studio", "tenant", "audit", "engine"}
"""Commands without a project, and those of its serving state (`project.state`) or of the machine (engines)."""


def test_project_has_a_method_for_every_command(tmp_path: Path, tiny_base_folder: Path) -> None:
    project = tunewright.open(tiny_project(tmp_path / "project", tiny_base_folder))
    lacking = []
    for path in _paths(get_command(commands())):
        place: object = project
        for part in path.split("."):
            verb = part.replace("-", "_")
            place = getattr(place, f"{verb}_" if keyword.iskeyword(verb) else verb, None)
        if not callable(place):
            lacking.append(path)
    assert lacking == []
    assert callable(project.serve_engine)


def _paths(group: Any) -> Iterator[str]:
    """The commands of a group, and of the groups in it."""
    for name, found in group.commands.items():
        if name in NO_VERBS:
            continue
        if hasattr(found, "commands"):
            yield from (f"{name}.{path}" for path in _paths(found))
        else:
            yield name


def test_python_and_command_line_create_the_same_versions(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    data = tunewright.open(folder).data
    first = data.add([folder / "pairs.jsonl"], message="all").version.digest
    more = folder / "more.jsonl"
    more.write_text('{"prompt": "what is as none of the others", "completion": "this"}\n', encoding="utf-8")
    second = data.add([more]).version.digest
    assert [m.digest for m in data.log()] == [first, second]
    assert [m["digest"] for m in command("data", "log", "-p", folder, "--json").document["versions"]] == [first, second]

    row = data.show("more.jsonl:1")
    assert [m.key for m in data.diff(first).added] == [row.key]
    assert data.blame("more.jsonl:1").version.digest == second
    assert data.trained_by(row.key[:12]) == (row.key, ())

    assert data.checkout(first[:12]).digest == data.version().digest == first
    with pytest.raises(UserError, match="has no row"):
        data.show(row.key)
    assert data.verify().ok


def test_data_add_and_check_take_the_configured_sources(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    config = folder / "tunewright.yaml"
    text = config.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # sources are relative to the project

    config.write_text(text.replace("sources:", "#sources:"), encoding="utf-8")
    bare = tunewright.open(folder).data
    for call in (bare.add, bare.check):
        with pytest.raises(UserError, match=r"(?s)^data\.sources: The config lists no sources .* data add FILE"):
            call()
    for name in ("add", "check"):
        refused = command("data", name, "-p", folder)
        assert refused.code == 2
        assert "data.sources: The config lists no sources" in refused.stderr

    config.write_text(text, encoding="utf-8")
    checked = tunewright.open(folder).data.check()
    assert isinstance(checked, Preview)
    assert checked.effect is not None
    by_command = command("data", "check", "--skip-bad", "-p", folder, "--json").document
    assert by_command["effect"]["added"] == checked.effect.added > 0
    assert [Path(file["source"]).name for file in by_command["files"]] == ["pairs.jsonl"]
    assert not (folder / "dataset").exists()

    added = command("data", "add", "-p", folder, "--json").document
    assert added["added"] == checked.effect.added
    assert not tunewright.open(folder).data.add().created
    assert "percentiles" in command("data", "check", "-p", folder, "--json").document["splits"][0]
    assert command("data", "check", "--skip-bad", "-p", folder).code == 2


def test_command_line_resumes_a_review_begun_in_python(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    data = tunewright.open(folder).data
    data.add([folder / "pairs.jsonl"])
    review = data.review("ann", options=ReviewOptions(fixed=0))
    card = review.next()
    assert card is not None
    review.judge(card, "right")
    status = data.review_status()
    assert status.outcome is not None
    assert status.outcome.checked == 1
    assert command("data", "review", "--status", "-p", folder, "--json").document == status.as_dict()
