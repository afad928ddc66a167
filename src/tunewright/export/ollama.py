"""A folder for ``ollama create``: a Modelfile, and the GGUF files that it names."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tunewright.chat import ChatFormat
from tunewright.chat.answers import stop_strings
from tunewright.chat.templates import Template
from tunewright.core.errors import UserError
from tunewright.core.io import link_or_copy, write_text
from tunewright.data.examples import Message
from tunewright.export.artifact import BuiltArtifact, ExportResult, ExportSource
from tunewright.export.gguf.artifact import base_file
from tunewright.export.gguf.tensors import PRECISIONS, FileType

CONVERSATIONS = 200
"""Random conversations on which a Go template is compared with the chat template."""

_SYSTEM, _FIRST = "\ue000", 0xE001  # private-use characters: no template writes them or strips them as white space
_WORDS = (
    "court",
    "d'été",
    "Łódź",
    "中文",
    "🙂",
    "{{ .System }}",
    '"""',
    "a\nb",
    "1,234.50",
    "x" * 30,
    "<b>",
    "\\n",
    "%s",
)


@dataclass(frozen=True)
class GoTemplate:
    """The texts that a chat format writes around messages."""

    system_place: Literal["front", "end", "none"]
    """The system text's place: before the first user turn, in the last user turn, or nowhere."""
    start: str
    """Before the first user's text, if there is no system text."""
    before: str
    """Before the system text, if it is in front."""
    between: str
    """Text between the system message and the first user message."""
    answer: str
    """Text between a user message and the next assistant message."""
    next: str
    """Text between an assistant message and the next user message."""
    ask: str
    """Text between the last user message and the start of the answer."""

    def render(self, messages: Sequence[Message]) -> str:
        """Return the Go template's output for a conversation that ends with the user."""
        system = next((m.content for m in messages if m.role == "system"), "")
        turns = [m for m in messages if m.role != "system"]
        front = bool(system) and self.system_place == "front"
        parts = [self.before + system + self.between if front else self.start]
        for place, turn in enumerate(turns):
            if turn.role == "assistant":
                parts.append(self.answer)
            elif place:
                parts.append(self.next)
            if system and self.system_place == "end" and place == len(turns) - 1:
                parts.append(system + self.between)
            parts.append(turn.content)
        return "".join([*parts, self.ask])

    @property
    def source(self) -> str:
        """The template in Go's language, over Ollama's ``.System`` and ``.Messages``."""
        user = "{{ if $later }}" + _literal(self.next) + "{{ end }}{{ $later = true }}"
        if self.system_place == "end":
            last = "and $.System (eq (len (slice $.Messages $i)) 1)"
            user += "{{ if " + last + " }}{{ $.System }}" + _literal(self.between) + "{{ end }}"
        head = _literal(self.start)
        if self.system_place == "front":
            front = _literal(self.before) + "{{ .System }}" + _literal(self.between)
            head = "{{ if .System }}" + front + "{{ else }}" + head + "{{ end }}"
        return (
            "{{ $later := false }}"
            + head
            + '{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}'
            + user
            + '{{ $m.Content }}{{ else if eq $m.Role "assistant" }}'
            + _literal(self.answer)
            + "{{ $m.Content }}{{ end }}{{ end }}"
            + _literal(self.ask)
        )


def go_template(chat: ChatFormat) -> GoTemplate:
    """Return the chat format as a Go template, without the beginning-of-text token, which engines add themselves."""
    template = chat.template
    try:
        asked = [Message("system", _SYSTEM), Message("user", "x")]
        system = _SYSTEM in template.render(asked, generation_prompt=True)
    except UserError:  # the format has no system text
        system = False
    first, second = (_cut(template, users, system=False) for users in (1, 2))
    found = GoTemplate(
        system_place="none", start=first[0], before="", between="", answer=second[1], next=second[2], ask=first[1]
    )
    if system:
        alone, later = (_cut(template, users, system=True) for users in (1, 2))
        at_front = _SYSTEM in later[0]
        place: Literal["front", "end"] = "front" if at_front else "end"
        before, _, between = alone[0].partition(_SYSTEM)
        if not at_front and before != found.start:
            raise _too_complex(template)
        found = replace(found, system_place=place, before=before, between=between)
    if chat.adds_bos:
        bos = str(chat.tokenizer.bos_token)
        found = replace(found, start=found.start.removeprefix(bos), before=found.before.removeprefix(bos))
    check_go_template(found, chat)
    return found


def check_go_template(found: GoTemplate, chat: ChatFormat) -> None:
    """Compare a Go template with the chat format on random conversations."""
    bos = str(chat.tokenizer.bos_token) if chat.adds_bos else ""
    for messages in conversations(system=found.system_place != "none"):
        wanted = chat.template.render(messages, generation_prompt=True).removeprefix(bos)
        if found.render(messages) != wanted:
            raise _too_complex(chat.template)


def conversations(*, system: bool, count: int = CONVERSATIONS, seed: int = 0) -> list[list[Message]]:
    """Return random conversations in which user and assistant alternate, with or without a system text.

    Texts have no white space at their ends: chat templates strip it, which Go templates cannot.
    """
    generator = random.Random(seed)

    def text() -> str:
        return " ".join(generator.choices(_WORDS, k=generator.randint(1, 6))).strip()

    drawn = []
    for _ in range(count):
        turns = [
            Message("user" if place % 2 == 0 else "assistant", text())
            for place in range(2 * generator.randint(0, 3) + 1)
        ]
        drawn.append([Message("system", text()), *turns] if system and generator.random() < 0.5 else turns)
    return drawn


def strips_whitespace(chat: ChatFormat) -> bool:
    """Return whether the chat format strips white space from a message's ends, which a Go template cannot."""
    padded, bare = (chat.template.render([Message("user", text)], generation_prompt=True) for text in (" x ", "x"))
    return padded == bare


def _cut(template: Template, users: int, *, system: bool) -> list[str]:
    """Return the text before, between and after the turns of a conversation with ``users`` user turns."""
    marks = [chr(_FIRST + place) for place in range(2 * users - 1)]
    turns = [Message("user" if place % 2 == 0 else "assistant", mark) for place, mark in enumerate(marks)]
    messages = [Message("system", _SYSTEM), *turns] if system else turns
    text = template.render(messages, generation_prompt=True)
    if any(text.count(mark) != 1 for mark in marks):
        raise _too_complex(template)
    return re.split("|".join(marks), text)


def _literal(text: str) -> str:
    """Return a text for a template inside a Modelfile, as a Go string if it would not survive otherwise."""
    plain = all(character.isprintable() or character in "\n\t" for character in text)
    if plain and "{{" not in text and '"""' not in text and not text.endswith(("{", '"')):
        return text
    escaped = ""
    for character in text:
        if character in '"\\':
            escaped += f"\\{character}"
        elif character.isprintable():
            escaped += character
        else:
            escaped += f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
    return '{{ "' + escaped + '" }}'


def _too_complex(template: Template) -> UserError:
    return UserError(
        "The chat template cannot be written as a Go template: it depends on more than the roles and the order of "
        "messages",
        where=template.name,
        fix="Use `tunewright export gguf --merged`, whose file has the chat template itself for llama.cpp.",
    )


MODELFILE = "Modelfile"


def build_ollama(
    folder: Path, source: ExportSource, parts: ExportResult, file_type: FileType, *, lora: bool
) -> BuiltArtifact:
    """Fill ``folder`` for Ollama from measured GGUF files: a merged one, or a LoRA file with its base under it."""
    project, record, chat = source.project, parts.record, source.project.chat
    assert parts.folder is not None
    (file,) = (parts.folder / name for name in record.files if name.endswith(".gguf"))
    files = [base_file(project, file_type), file] if lora else [file]
    for each in files:
        link_or_copy(each, folder / each.name)
    template, prompt = go_template(chat), source.system_prompt.text
    system = None
    if prompt is not None:
        # A chat template that strips messages also strips this text; Ollama's template does not.
        system = modelfile_system(prompt.strip() if strips_whitespace(chat) else prompt)
    stop, context = stop_strings(project.folder.config, chat), project.folder.config.train.max_length
    names = [each.name for each in files]
    write_text(folder / MODELFILE, modelfile(template.source, chat, stop, names, context, system))
    notes = ["Ollama and llama.cpp read text that looks like a special token as that token; here it stays text"]
    with suppress(UserError):  # without a form of functions, the template loses nothing
        _ = chat.tool_form
        notes.append(
            "functions are not in the Modelfile, and Ollama refuses requests with tools: Go writes their JSON without "
            "spaces and with escaped <, > and &, which differs from the JSON of training. Serve the GGUF file with "
            "llama.cpp for functions"
        )
    if strips_whitespace(chat):
        notes.append(
            "the chat template strips white space from both ends of messages and Ollama's does not: send them stripped"
        )
    if system is not None:
        notes.append("the Modelfile's SYSTEM is the trained system prompt; a request's own system prompt replaces it")
    elif prompt is not None:
        notes.append(
            "a Modelfile cannot hold the trained system prompt (a non-printable character, or a line that ends with "
            f'"""): send it with each request: {prompt}'
        )
    if template.system_place == "none":
        notes.append("the chat template accepts no system text, and Ollama drops one silently")
    return BuiltArtifact(record.figures, PRECISIONS[file_type], record.way, record.ways, (*record.notes, *notes))


def modelfile_system(text: str) -> str | None:
    """Return the Modelfile's line for the system prompt; None for a text that its parser cannot read back.

    Ollama's parser drops non-printable characters, and ends a value at the first line that ends with its quotes.
    """
    readable = all(character.isprintable() or character in "\n\t" for character in text)
    if not readable or any(line.rstrip().endswith('"""') for line in text.split("\n")[:-1]):
        return None
    return f'SYSTEM """{text}"""'


def modelfile(
    template: str, chat: ChatFormat, stop: Sequence[str], files: Sequence[str], context: int, system: str | None = None
) -> str:
    """Return the Modelfile's text; ``files`` are the model, and its LoRA file if there is one."""
    ends = sorted(str(chat.tokenizer.convert_ids_to_tokens(token)) for token in chat.stop_ids)
    stops = {text: '"""' if "\n" in text or '"' in text else '"' for text in (*ends, *stop)}
    lines = [
        f"FROM ./{files[0]}",
        *(f"ADAPTER ./{lora}" for lora in files[1:]),
        f'TEMPLATE """{template}"""',
        *([system] if system else []),
        *(f"PARAMETER stop {quotes}{text}{quotes}" for text, quotes in stops.items()),
        # As measured: greedy, without a repetition penalty.
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        f"PARAMETER num_ctx {context}",
    ]
    return "\n".join(lines) + "\n"
