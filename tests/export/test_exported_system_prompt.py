"""An exported model adds the trained system prompt to conversations without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import tunewright
from making.command_line import tiny_project
from making.command_line import tunewright as command
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Message
from tunewright.export.gguf.artifact import running
from tunewright.open_project import OpenProject

pytestmark = pytest.mark.slow

SYSTEM = "Name the first colour, d'été."


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    folder = tiny_project(tmp_path_factory.mktemp("export") / "project", tiny_base_folder)
    config = folder / "tunewright.yaml"
    text = config.read_text(encoding="utf-8").replace("data:\n", f'data:\n  system_prompt: "{SYSTEM}"\n')
    text = text.replace("evaluate:\n", "evaluate:\n  max_new_tokens: 3\n").replace("0.003", "0.01")
    config.write_text(text, encoding="utf-8")
    assert command("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    assert command("train", "-p", folder).code == 0
    return folder


def _asked(project: Path) -> list[tuple[list[dict[str, Any]], tuple[int, ...]]]:
    """Users' turns of held-out rows, and the ids that the rows' whole prompts have."""
    chat = OpenProject(ProjectFolder(project), LogReporter()).chat
    members = tunewright.open(project).data.version().examples("test")[:4]
    return [
        (
            [m.as_dict() for m in member.example.prompt if m.role != "system"],
            chat.prompt(member.example.prompt),
        )
        for member in members
    ]


def _exported(project: Path, *arguments: str) -> tuple[Path, str]:
    """The folder, and the record's notes."""
    ran = command("export", *arguments, "-p", project, "--json")
    assert ran.code == 0, ran.stderr
    return Path(ran.document["folder"]), "\n".join(ran.document["notes"])


def test_merged_gguf_template_adds_the_system_prompt_in_llama_cpp(project: Path) -> None:
    folder, notes = _exported(project, "gguf", "--merged")
    assert "its chat template adds the trained system prompt" in notes
    chat = OpenProject(ProjectFolder(project), LogReporter()).chat
    with running(next(folder.glob("*.gguf")), 512) as engine:
        for turns, ids in _asked(project):
            messages = [Message(t["role"], t["content"]) for t in turns]
            assert tuple(engine.prompt_ids(messages, chat.template)) == ids


def test_export_names_the_place_of_the_system_prompt(project: Path) -> None:
    _, notes = _exported(project, "gguf")
    assert f"the adapter's file alone has no system prompt: send the trained one: {SYSTEM}" in notes
    for options in ((), ("--lora",)):
        folder, notes = _exported(project, "ollama", *options)
        assert f'\nSYSTEM """{SYSTEM}"""\n' in (folder / "Modelfile").read_text(encoding="utf-8")
        assert "the Modelfile's SYSTEM is the trained system prompt" in notes


def test_merged_template_adds_the_system_prompt_and_belongs_to_the_inputs(project: Path, tmp_path: Path) -> None:
    folder, notes = _exported(project, "merge", "--to", str(tmp_path / "merged"))
    assert f'its chat template adds the trained system prompt if there is no other: "{SYSTEM}"' in notes
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for turns, ids in _asked(project):
        assert tuple(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)) == ids
    record = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    assert record["made_of"].pop("system_prompt") == SYSTEM
    (folder / "export.json").write_text(json.dumps(record), encoding="utf-8")
    ran = command("export", "merge", "--to", folder, "-p", project)
    assert (ran.code, "system_prompt differs" in ran.stderr) == (2, True)
