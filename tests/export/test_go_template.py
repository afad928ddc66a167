"""Go templates of chat formats, rendered by Go's own text/template with Ollama's data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from making.makers import llama2_tokenizer, llama3_tokenizer, mistral_tokenizer
from making.tiny_bases import byte_tokenizer, chat_of
from tunewright.chat import ChatFormat
from tunewright.core.errors import UserError
from tunewright.data.examples import Message
from tunewright.export.ollama import (
    GoTemplate,
    check_go_template,
    conversations,
    go_template,
    modelfile,
    modelfile_system,
    strips_whitespace,
)

pytestmark = pytest.mark.slow

# As template.Execute of Ollama does for a template that reads .Messages: neighbours of one role become one message,
# the system texts are .System, and the messages (system ones too) are .Messages.
PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct {
	Role    string
	Content string
}

type Job struct {
	Template      string
	Conversations [][]Message
}

func main() {
	var jobs []Job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	rendered := [][]string{}
	for _, job := range jobs {
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(job.Template))
		texts := []string{}
		for _, messages := range job.Conversations {
			var system []string
			var merged []*Message
			for i := range messages {
				if messages[i].Role == "system" {
					system = append(system, messages[i].Content)
				}
				if n := len(merged); n > 0 && merged[n-1].Role == messages[i].Role {
					merged[n-1].Content += "\\n\\n" + messages[i].Content
				} else {
					merged = append(merged, &messages[i])
				}
			}
			var text strings.Builder
			values := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": merged, "Response": ""}
			if err := parsed.Execute(&text, values); err != nil {
				panic(err)
			}
			texts = append(texts, text.String())
		}
		rendered = append(rendered, texts)
	}
	json.NewEncoder(os.Stdout).Encode(rendered)
}
"""

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
AWKWARD = (
    "{% for m in messages %}{{ '{{' + m['role'] + '}}\"\"\"\u2028\\\\n' + m['content'] + '<|im_end|>{' }}{% endfor %}"
    '{% if add_generation_prompt %}{{ \'{{assistant}}"""\u2028\\\\n\' }}{% endif %}'
)


def _with_template(source: str) -> ChatFormat:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    return chat_of(tokenizer)


FORMATS: dict[str, Callable[[], ChatFormat]] = {
    "ChatML": lambda: chat_of(byte_tokenizer()),
    "ChatML with a system text of its own": lambda: _with_template(SMOLLM),
    "plain": lambda: chat_of(byte_tokenizer(), "plain"),
    "what Go and Modelfiles take for their own": lambda: _with_template(AWKWARD),
    "Llama 3": lambda: chat_of(llama3_tokenizer("llama3")),
    "Llama 3.1": lambda: chat_of(llama3_tokenizer("llama3_1")),
    "Llama 2": lambda: chat_of(llama2_tokenizer()),
    "Mistral v1": lambda: chat_of(mistral_tokenizer("v1")),
    "Mistral v3": lambda: chat_of(mistral_tokenizer("v3")),
    "Mistral v7": lambda: chat_of(mistral_tokenizer("v7")),
    "Mistral v7-tekken": lambda: chat_of(mistral_tokenizer("v7-tekken")),
}


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[ChatFormat, GoTemplate]]:
    chats = {name: build() for name, build in FORMATS.items()}
    return {name: (chat, go_template(chat)) for name, chat in chats.items()}


def _by_go(jobs: list[dict[str, Any]], folder: Path) -> list[list[str]]:
    """Render with Go's text/template."""
    program = folder / "main.go"
    program.write_text(PROGRAM, encoding="utf-8")
    go = Path(sys.executable).parent / "go"
    ran = subprocess.run([go, "run", program], input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    rendered: list[list[str]] = json.loads(ran.stdout)
    return rendered


def test_go_template_renders_as_the_chat_template(
    found: dict[str, tuple[ChatFormat, GoTemplate]], tmp_path: Path
) -> None:
    asked = {
        name: conversations(system=made.system_place != "none", count=60, seed=7) for name, (_, made) in found.items()
    }
    jobs = [
        {
            "Template": _template_of(modelfile(made.source, chat, (), ["model.gguf"], 2048)),
            "Conversations": [[{"Role": m.role, "Content": m.content} for m in messages] for messages in asked[name]],
        }
        for name, (chat, made) in found.items()
    ]
    for name, texts in zip(found, _by_go(jobs, tmp_path), strict=True):
        chat, _ = found[name]
        bos = str(chat.tokenizer.bos_token) if chat.adds_bos else ""
        wanted = [chat.template.render(m, generation_prompt=True).removeprefix(bos) for m in asked[name]]
        assert texts == wanted, name


def _template_of(text: str) -> str:
    """A Modelfile's template as Ollama's parser reads it: what is printable or white space, between triple quotes."""
    kept = "".join(c for c in text if c.isprintable() or c in "\n\t")
    before, _, rest = kept.partition('TEMPLATE """')
    template, _, _ = rest.partition('"""')
    assert before.startswith("FROM ")
    return template


@pytest.mark.parametrize(
    "text",
    [
        "Plain.",
        'Say "yes"',
        '"""',
        'one\n""\ntwo "three"\n',
        "\n  d'été\t中文 🙂\n\n",
        'a """ b',
        "{{ .System }} \\n # no",
    ],
)
def test_modelfile_system_prompt_is_read_back_unchanged(text: str) -> None:
    chat = chat_of(byte_tokenizer())
    line = modelfile_system(text)
    assert line is not None
    written = modelfile("T", chat, ("\n### Instruction",), ["base.gguf"], 2048, line)
    read = _read_modelfile(written)
    assert read["SYSTEM"] == text
    assert (read["TEMPLATE"], read["PARAMETER"]) == ("T", "num_ctx 2048")


@pytest.mark.parametrize("text", ['one\n"""\ntwo', 'one """  \ntwo', 'one """\n', "a\u00a0b", "bell\x07"])
def test_modelfile_omits_a_system_prompt_that_ollama_would_change(text: str) -> None:
    assert modelfile_system(text) is None
    assert _read_modelfile(f'FROM x\nSYSTEM """{text}"""\n').get("SYSTEM") != text


def _read_modelfile(text: str) -> dict[str, str]:
    """The last value of each command, by the rules of Ollama's parser.

    A value ends at the first line's end where what was read so far is whole: without quotes, or between them. What
    cannot be printed is left out.
    """
    read: dict[str, str] = {}
    name: str | None = None
    value = ""
    for character in text:
        if name is None:
            value += character
            if character == " ":
                name, value = value.strip(), ""
            elif character in "\r\n":
                value = ""
        elif character in "\r\n" and (whole := _unquoted(value.strip())) is not None:
            read[name], name, value = whole, None, ""
        elif character.isprintable() or character in "\t\r\n":
            value += character
    return read


def _unquoted(value: str) -> str | None:
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            whole = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if whole else None
    return value


def test_go_template_learns_the_place_of_the_system_text(found: dict[str, tuple[ChatFormat, GoTemplate]]) -> None:
    places = {name: made.system_place for name, (_, made) in found.items()}
    assert places["Mistral v3"] == "end"
    assert {place for name, place in places.items() if name != "Mistral v3"} == {"front"}
    assert {name for name, (chat, _) in found.items() if strips_whitespace(chat)} == {"Llama 3", "Llama 3.1", "Llama 2"}


def test_check_go_template_finds_any_wrong_text(found: dict[str, tuple[ChatFormat, GoTemplate]]) -> None:
    for chat, made in found.values():
        for part in ("start", "between", "answer", "next", "ask"):
            wrong = replace(made, **{part: getattr(made, part) + "x"})
            with pytest.raises(UserError, match="cannot be written as a Go template"):
                check_go_template(wrong, chat)


@pytest.mark.parametrize(
    "content", ["m['content'] ~ loop.index", "m['content'] ~ (m['content'] | length)", "m['content'].replace('a', 'b')"]
)
def test_go_template_refuses_formats_beyond_roles_and_order(content: str) -> None:
    chat = _with_template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ " + content + " }}{{ '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(UserError, match="cannot be written as a Go template"):
        go_template(chat)


def test_modelfile_is_greedy_and_has_the_stop_tokens_of_training() -> None:
    chat = chat_of(byte_tokenizer())
    lines = modelfile("T", chat, ("\n### Instruction",), ["base.gguf", "lora.gguf"], 2048).splitlines()
    assert lines == [
        "FROM ./base.gguf",
        "ADAPTER ./lora.gguf",
        'TEMPLATE """T"""',
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop """',
        '### Instruction"""',
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        "PARAMETER num_ctx 2048",
    ]


def test_go_template_accepts_formats_without_system_text() -> None:
    chat = _with_template(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    made = go_template(chat)
    assert made.system_place == "none"
    assert made.render([Message("user", "a")]) == "<|im_start|>a<|im_end|><|im_start|>"
