"""An adapter that was trained on functions keeps them in every export, or the export says that it does not."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from export_helpers import open_base
from transformers import AutoTokenizer

from making.command_line import tiny_project, tunewright, write_jsonl
from making.tiny_bases import build_base, tiny_model
from making.tool_families import FAMILIES, family, openai
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter
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
    config.write_text(text.replace("evaluate:\n", "evaluate:\n  max_new_tokens: 3\n"), encoding="utf-8")
    for arguments in (("data", "add", project / "pairs.jsonl"), ("train",)):
        ran = tunewright(*arguments, "-p", project)
        assert ran.code == 0, ran.stderr
    return project


@pytest.mark.slow
def test_merged_folder_and_gguf_render_rows_with_functions(project: Path) -> None:
    chat = OpenProject(ProjectFolder(project), LogReporter()).chat
    for arguments in (("merge",), ("gguf", "--merged"), ("gguf",)):
        ran = tunewright("export", *arguments, "-p", project, "--json")
        assert ran.code == 0, ran.stderr
        figures = ran.document["figures"]
        assert figures["rendered"] == figures["prompts"] > 0
        assert figures["functions_rendered"] == figures["functions"] == len(function_conversations(chat, None))
        if arguments == ("merge",):
            tokenizer = AutoTokenizer.from_pretrained(ran.document["folder"])
            asked = openai(list(function_conversations(chat, None)[0]))
            shown = tokenizer.apply_chat_template(
                asked["messages"], tools=asked["tools"], tokenize=False, add_generation_prompt=True
            )
            assert "<tools>" in shown
            assert '"name": "clock_time"' in shown
        if arguments == ("gguf",):
            assert "<tool_call>" in (Path(ran.document["folder"]) / "chat_template.jinja").read_text(encoding="utf-8")
            assert any("--chat-template-file chat_template.jinja" in note for note in ran.document["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--lora",)])
def test_modelfile_without_functions_is_reported(project: Path, options: tuple[str, ...]) -> None:
    ran = tunewright("export", "ollama", *options, "-p", project)
    assert ran.code == 0, ran.stderr
    assert "functions are not in the Modelfile" in ran.stdout
    modelfile = next((project / "exports").glob(f"*-ollama-{'lora-' if options else ''}f16/Modelfile"))
    assert ".Tools" not in modelfile.read_text(encoding="utf-8")
