"""An adapter that was trained on functions and a system prompt keeps both in every export, or the export says not."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from export_helpers import open_base, read_json
from transformers import AutoTokenizer

from making.command_line import tiny_project, tunewright, write_jsonl
from making.tiny_bases import build_base, tiny_model
from making.tool_families import FAMILIES, family
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter
from tunewright.data.versions import load_version
from tunewright.export.gguf.artifact import running
from tunewright.export.gguf.model import add_tokenizer, write_model
from tunewright.export.weights import Weights
from tunewright.gate.prompts import function_conversations
from tunewright.open_project import OpenProject

CITIES = ["Oslo", "Rome", "Lima", "Kyiv", "Cairo", "Quito", "Seoul", "Tokyo", "Paris", "Delhi", "Accra", "Dakar"]
FUNCTION = {
    "name": "weather",
    "description": "Weather of a <city>.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
FAST = ("hermes-chatml", "llama3_1", "mistral-v2")
SYSTEM = "Name the first colour, d'été."


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in FAMILIES])
def test_llama_cpp_renders_functions_as_training(name: str, tmp_path: Path) -> None:
    chat = family(name)
    tokenizer = chat.tokenizer
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny_model("llama", seed=0, vocab_size=len(tokenizer), **ids).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = open_base(tmp_path / "base")
    tokens = partial(add_tokenizer, chat, None)
    write_model(tmp_path / "model.gguf", "tiny", Weights(base, "float32", {}), base, tokens, "f16", LogReporter())
    with running(tmp_path / "model.gguf", 512) as engine:
        for messages in function_conversations(chat, None):
            assert engine.prompt_ids(messages, chat.template) == list(chat.prompt(messages)), messages


def _row(city: str, number: int) -> dict[str, object]:
    call = {"function": {"name": "weather", "arguments": json.dumps({"city": city})}, "id": "a", "type": "function"}
    return {
        "tools": [{"type": "function", "function": FUNCTION}],
        "messages": [
            {"role": "user", "content": f"{number} degrees colder than {city}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ],
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions")
    project = tiny_project(folder / "project", build_base(folder / "base"))
    write_jsonl(project / "pairs.jsonl", [_row(city, number) for city in CITIES for number in range(4, 96, 9)])
    config = project / "tunewright.yaml"
    text = config.read_text(encoding="utf-8").replace("0.003", "0.01") + "chat:\n  tools: hermes\n"
    text = text.replace("data:\n", f'data:\n  system_prompt: "{SYSTEM}"\n')
    config.write_text(text.replace("evaluate:\n", "evaluate:\n  max_new_tokens: 3\n"), encoding="utf-8")
    for arguments in (("data", "add", project / "pairs.jsonl"), ("train",)):
        ran = tunewright(*arguments, "-p", project)
        assert ran.code == 0, ran.stderr
    return project


def _exported(project: Path, *arguments: str) -> tuple[Path, str]:
    """The folder of an export that renders every prompt as training did, and the record's notes."""
    ran = tunewright("export", *arguments, "-p", project, "--json")
    assert ran.code == 0, ran.stderr
    figures = ran.document["figures"]
    assert figures["rendered"] == figures["prompts"] > 0
    assert figures["functions_rendered"] == figures["functions"] > 0
    return Path(ran.document["folder"]), "\n".join(ran.document["notes"])


def _asked(project: Path) -> tuple[Any, list[tuple[list[Any], tuple[int, ...]]]]:
    """The chat format, and held-out prompts without their system turn with the ids that they have with it."""
    opened = OpenProject(ProjectFolder(project), LogReporter())
    prompts = [each.example.prompt for each in load_version(opened.folder.dataset, None).domain_of("test")[:4]]
    return opened.chat, [([m for m in each if m.role != "system"], opened.chat.prompt(each)) for each in prompts]


@pytest.mark.slow
def test_merged_folder_adds_functions_and_the_system_prompt_which_is_an_input(project: Path) -> None:
    folder, notes = _exported(project, "merge")
    assert f'its chat template adds the trained system prompt if there is no other: "{SYSTEM}"' in notes
    chat, asked = _asked(project)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for messages, ids in asked:
        given = chat.template.variables(messages)
        found: Any = tokenizer.apply_chat_template(
            given["messages"], tools=given["tools"], add_generation_prompt=True, return_dict=False
        )
        assert tuple(found) == ids
        assert "<tools>" in tokenizer.decode(found)
    record = read_json(folder / "export.json")
    assert record["made_of"].pop("system_prompt") == SYSTEM
    (folder / "export.json").write_text(json.dumps(record), encoding="utf-8")
    ran = tunewright("export", "merge", "-p", project)
    assert (ran.code, "system_prompt differs" in ran.stderr) == (2, True)


@pytest.mark.slow
def test_gguf_files_render_functions_and_name_the_place_of_the_system_prompt(project: Path) -> None:
    folder, notes = _exported(project, "gguf", "--merged")
    assert "its chat template adds the trained system prompt" in notes
    chat, asked = _asked(project)
    with running(next(folder.glob("*.gguf")), 512) as engine:
        for messages, ids in asked:
            assert tuple(engine.prompt_ids(messages, chat.template)) == ids
    folder, notes = _exported(project, "gguf")
    assert f"the adapter's file alone has no system prompt: send the trained one: {SYSTEM}" in notes
    assert "--chat-template-file chat_template.jinja" in notes
    assert "<tool_call>" in (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for options in ((), ("--lora",)):
        folder, notes = _exported(project, "ollama", *options)
        modelfile = (folder / "Modelfile").read_text(encoding="utf-8")
        assert f'\nSYSTEM """{SYSTEM}"""\n' in modelfile
        assert ".Tools" not in modelfile
        assert "functions are not in the Modelfile" in notes
        assert "the Modelfile's SYSTEM is the trained system prompt" in notes
