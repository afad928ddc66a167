"""``advise`` through the command line, on a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from making.command_line import Ran, tiny_project, tunewright
from tunewright.adapters.registry import list_adapters

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def advised(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> tuple[Path, Ran]:
    """A project whose pilots had 60 and 120 rows, and what the command printed."""
    project = tiny_project(tmp_path_factory.mktemp("advise") / "project", tiny_base_folder, 300)
    config = project / "tunewright.yaml"
    config.write_text(config.read_text() + "advise:\n  pilot_fraction: 0.5\n  calls_per_month: 1000\n")
    assert tunewright("data", "add", project / "pairs.jsonl", "-p", project).code == 0
    return project, tunewright("advise", "--json", "-p", project)


Advised = tuple[Path, Ran]


def test_advise_reports_three_signals_and_exits_with_its_answer(advised: Advised) -> None:
    _, ran = advised
    document = ran.document
    assert ran.code == {"fine-tune": 0, "prompt": 3, "retrieve": 3, "no model": 3, "can't tell": 4}[document["answer"]]
    assert list(document["signals"]) == ["free arms", "context budget", "break-even", "gain"]
    assert document["changes"]
    assert "300 pairs, fewer than 500" in document["expect"][0]


def test_no_command_names_the_advice(advised: Advised, monkeypatch: pytest.MonkeyPatch) -> None:
    project, ran = advised
    monkeypatch.chdir(project)
    shown = tunewright().stdout
    assert f"  Advise    {ran.document['answer']}" in shown and ran.document["why"] in shown


def test_advise_stores_pilots_outside_the_adapters_folder(advised: Advised) -> None:
    project, ran = advised
    assert list_adapters(project / "adapters") == []
    stored = {a.digest: a for a in list_adapters(project / ".tunewright" / "pilot" / "adapters")}
    parts = ran.document["advice"]["gain"]["parts"]
    assert [p["adapter"] in stored for p in parts] == [True, True]
    assert [stored[p["adapter"]].lineage["pilot"]["rows"] for p in parts] == [p["rows"] for p in parts]
    assert parts[1]["rows"] == pytest.approx(2 * parts[0]["rows"], abs=2)


def test_advise_reuses_stored_advice_with_the_same_answer(advised: Advised, tmp_path: Path) -> None:
    project, ran = advised
    again = tunewright("advise", "-p", project)
    assert again.code == ran.code
    assert "Loading" not in again.stderr and f"Answer: {ran.document['answer']}" in again.stdout
    stored = Path(ran.document["file"])
    assert json.loads(stored.read_text()) == ran.document["advice"]
    elsewhere = tmp_path / "copied.json"
    elsewhere.write_bytes(stored.read_bytes())
    alone = tunewright("advise", elsewhere, "--json", "-p", tmp_path)
    by_id = tunewright("advise", stored.stem, "--json", "-p", project)
    assert alone.code == by_id.code == ran.code
    for key in ("answer", "why", "signals", "changes", "expect", "advice"):
        assert alone.document[key] == by_id.document[key] == ran.document[key]


def test_advise_without_a_pilot_trains_nothing_and_names_missing_signals(advised: Advised) -> None:
    project, _ = advised
    before = {p.name for p in (project / ".tunewright" / "pilot" / "adapters").iterdir()}
    ran = tunewright("advise", "--no-pilot", "--json", "-p", project)
    assert ran.document["answer"] in {"prompt", "retrieve", "no model", "can't tell"}
    assert ran.document["advice"]["left_out"]["gain"] == "--no-pilot"
    assert ran.document["signals"]["gain"] == "Not measured: --no-pilot."
    assert {p.name for p in (project / ".tunewright" / "pilot" / "adapters").iterdir()} == before
