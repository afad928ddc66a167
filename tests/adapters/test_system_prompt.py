"""The system prompt that an adapter was trained with, from its lineage or from its dataset version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from making.command_line import pairs, tiny_project, tunewright, write_jsonl
from making.small_adapters import write_adapter
from tunewright.adapters.foreign.documents import check_lineage
from tunewright.adapters.lineage import KEY, SystemPrompt, count_system_turns, system_prompt
from tunewright.adapters.registry import LINEAGE, Adapter, find_adapter
from tunewright.core.errors import UserError
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member

SYSTEM = "Name the first colour."


def _member(number: int, system: str | None) -> Member:
    turns = [Message("user", f"question {number}"), Message("assistant", "answer")]
    example = Example((*([Message("system", system)] if system else []), *turns))
    return Member(example, example.pair_key, "train", example.pair_key)


def _lineage_of(systems: list[str | None]) -> dict[str, Any]:
    return count_system_turns([_member(number, system) for number, system in enumerate(systems)])


def _adapter(folder: Path, **lineage: Any) -> Adapter:
    write_adapter(folder)
    known = {"created": "2026-01-01T00:00:00+00:00", "digest": "0" * 64, **lineage}
    (folder / LINEAGE).write_text(json.dumps(known), encoding="utf-8")
    return Adapter(folder)


@pytest.mark.parametrize(
    ("systems", "text", "why"),
    [
        (["A", "A"], "A", None),
        ([None, None], None, None),
        (["A", "B", "A"], None, "its 3 training rows have 2 different system turns"),
        (["A", None, "A"], None, "2 of its 3 training rows have a system turn, and 1 have none"),
        (["A", "B", None], None, "2 of its 3 training rows have 2 different system turns, and 1 have none"),
    ],
)
def test_lineage_has_the_shared_system_turn_or_the_reason(
    tmp_path: Path, systems: list[str | None], text: str | None, why: str | None
) -> None:
    adapter = _adapter(tmp_path / "adapter", **{KEY: _lineage_of(systems)})
    assert system_prompt(adapter, tmp_path / "nowhere") == SystemPrompt(text, why)


def test_adapter_without_lineage_has_an_unknown_system_prompt(tmp_path: Path) -> None:
    found = system_prompt(_adapter(tmp_path / "adapter"), tmp_path / "nowhere")
    assert (found.text, "imported without a lineage" in str(found.why_none)) == (None, True)


MARKED = "\u0300\u0316" * 16


@pytest.mark.parametrize(
    "claim",
    [
        {"text": 7},
        {"text": "x", "rows": "many", "without": 0, "distinct": 1},
        {"text": MARKED, "rows": 1, "without": 0, "distinct": 1},
        "x",
    ],
)
def test_foreign_lineage_with_an_invalid_system_prompt_is_refused(project: Path, tmp_path: Path, claim: Any) -> None:
    adapter = find_adapter(project / "adapters")
    data = json.dumps({**adapter.lineage, KEY: claim}).encode()
    check_lineage(json.dumps(adapter.lineage).encode(), "here")
    with pytest.raises(UserError, match=KEY):
        check_lineage(data, "here")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project whose pairs get a system turn, and generic rows without one are mixed in."""
    folder = tiny_project(tmp_path_factory.mktemp("system") / "project", tiny_base_folder)
    turns = [[{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": "ok"}] for p in pairs(40, 7)]
    write_jsonl(folder / "generic.jsonl", [{"messages": each} for each in turns])
    config = folder / "tunewright.yaml"
    text = config.read_text(encoding="utf-8").replace("epochs: 2", "epochs: 1")
    mix = "  mix: {source: generic.jsonl, fraction: 0.1}\n"
    config.write_text(text.replace("data:\n", f"data:\n  system_prompt: {SYSTEM}\n{mix}"), encoding="utf-8")
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    ran = tunewright("train", "-p", folder)
    assert ran.code == 0, ran.stderr
    return folder


def test_training_records_the_system_prompt_with_any_mix_in(project: Path) -> None:
    adapter = find_adapter(project / "adapters")
    assert adapter.lineage["dataset"]["mix"]["drawn"] > 0
    assert adapter.lineage[KEY]["text"] == SYSTEM
    ran = tunewright("adapters", "show", "-p", project)
    assert f'system prompt: "{SYSTEM}"' in " ".join((ran.stdout + ran.stderr).split())
    assert tunewright("adapters", "show", "-p", project, "--json").document["system_prompt"]["text"] == SYSTEM


def test_older_lineage_takes_the_system_prompt_from_the_dataset_version(project: Path, tmp_path: Path) -> None:
    lineage = {name: value for name, value in find_adapter(project / "adapters").lineage.items() if name != KEY}
    older = _adapter(tmp_path / "older", **lineage)
    assert system_prompt(older, project / "dataset") == SystemPrompt(SYSTEM)
    unknown = system_prompt(older, tmp_path / "no-dataset")
    assert unknown.text is None
    assert "its dataset version cannot be read" in str(unknown.why_none)
