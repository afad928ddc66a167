"""A folder for ``ollama create``: a Modelfile, and the GGUF files that it names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunewright.chat import ChatFormat
from tunewright.chat.answers import stop_strings
from tunewright.core.errors import UserError
from tunewright.core.io import link_or_copy, write_text
from tunewright.export.artifact import BuiltArtifact, ExportResult
from tunewright.export.gguf.artifact import base_file
from tunewright.export.gguf.tensors import PRECISIONS, FileType
from tunewright.export.go_template import go_template, strips_whitespace
from tunewright.export.source import Source

MODELFILE = "Modelfile"


def build_ollama(
    folder: Path, source: Source, parts: ExportResult, file_type: FileType, *, lora: bool
) -> BuiltArtifact:
    """Fill ``folder`` for Ollama from measured GGUF files: a merged one, or a LoRA file with its base under it."""
    project, record = source.project, parts.record
    assert parts.folder is not None
    (file,) = (parts.folder / name for name in record.files if name.endswith(".gguf"))
    model, adapter = (base_file(project, file_type), file) if lora else (file, None)
    stop, context = stop_strings(project.folder.config, project.chat), project.folder.config.train.max_length
    notes = write_ollama(folder, project.chat, source.system_prompt.text, stop, model, adapter, context)
    return BuiltArtifact(record.figures, PRECISIONS[file_type], record.way, record.ways, (*record.notes, *notes))


def write_ollama(
    folder: Path,
    chat: ChatFormat,
    system_prompt: str | None,
    stop: Sequence[str],
    model: Path,
    lora: Path | None,
    context: int,
) -> tuple[str, ...]:
    """Write the Modelfile and the files that it names.

    Returns:
        Notes for the user.

    Raises:
        UserError: a chat format that no Go template can express.
    """
    template = go_template(chat)
    for file in filter(None, (model, lora)):
        link_or_copy(file, folder / file.name)
    system = None
    if system_prompt is not None:
        # A chat template that strips messages also strips this one; Ollama's does not.
        system = modelfile_system(system_prompt.strip() if strips_whitespace(chat) else system_prompt)
    text = modelfile(template.source, chat, stop, model.name, lora.name if lora else None, context, system)
    write_text(folder / MODELFILE, text)
    notes = ["Ollama and llama.cpp read text that looks like a special token as that token; here it stays text"]
    if _writes_functions(chat):
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
    elif system_prompt is not None:
        notes.append(
            "a Modelfile cannot hold the trained system prompt (a non-printable character, or a line that ends with "
            f'"""): send it with each request: {system_prompt}'
        )
    if template.system_place == "none":
        notes.append("the chat template accepts no system text, and Ollama drops one silently")
    return tuple(notes)


def modelfile_system(text: str) -> str | None:
    """Return the Modelfile's line for the system prompt; None for a text that its parser cannot read back.

    Ollama's parser drops non-printable characters, and ends a value at the first line that ends with its quotes.
    """
    readable = all(character.isprintable() or character in "\n\t" for character in text)
    if not readable or any(line.rstrip().endswith('"""') for line in text.split("\n")[:-1]):
        return None
    return f'SYSTEM """{text}"""'


def modelfile(
    template: str,
    chat: ChatFormat,
    stop: Sequence[str],
    model: str,
    lora: str | None,
    context: int,
    system: str | None = None,
) -> str:
    """Return the Modelfile's text."""
    ends = sorted(str(chat.tokenizer.convert_ids_to_tokens(token)) for token in chat.stop_ids)
    lines = [
        f"FROM ./{model}",
        *([f"ADAPTER ./{lora}"] if lora else []),
        f'TEMPLATE """{template}"""',
        *([system] if system else []),
        *(f"PARAMETER stop {_quoted(text)}" for text in (*ends, *stop)),
        # As measured: greedy, without a repetition penalty.
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        f"PARAMETER num_ctx {context}",
    ]
    return "\n".join(lines) + "\n"


def _writes_functions(chat: ChatFormat) -> bool:
    """Return whether the chat template has a form of functions, which the Go template lacks."""
    try:
        _ = chat.tool_form
    except UserError:
        return False
    return True


def _quoted(text: str) -> str:
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'
