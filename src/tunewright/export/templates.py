"""The chat template of an exported model: it renders what training rendered, in any engine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tunewright.chat import ChatFormat
from tunewright.chat.templates import Template
from tunewright.core.errors import UserError
from tunewright.data.examples import Message

TEMPLATE_FILE = "chat_template.jinja"

_ASKS_FOR_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")

_DEFAULT_SYSTEM = """\
{{%- if messages | selectattr('role', 'equalto', 'system') | list | length == 0 -%}}
{{%- set messages = [{{'role': 'system', 'content': {text}}}] + messages -%}}
{{%- endif -%}}
"""
_ESCAPES = str.maketrans({"\\": r"\\", "'": r"\'", "\n": r"\n", "\r": r"\r", "\t": r"\t"})


def exported_template(chat: ChatFormat, system_prompt: str | None = None) -> str:
    """Return the Jinja template of the chat format with everything else that decides its rendering written into it.

    This is the system prompt that the adapter was trained with, for conversations without a system message; the pinned
    date (`chat.date`); the beginning-of-text token, if the tokenizer adds it and the template does not, since engines
    encode a rendered template without adding any; and sentencepiece's space before a text's first word.
    """
    template = chat.template
    source = _ASKS_FOR_TODAY.sub(lambda call: repr(template.today.strftime(call["format"])), template.source)
    if "strftime_now(" in source:
        raise UserError(
            "The chat template computes its date, which cannot be pinned in an exported template",
            where=template.name,
            fix="Edit the template in the base's tokenizer files.",
        )
    if template.uses_date:
        source = f"{{%- set date_string = {template.today.strftime('%d %b %Y')!r} -%}}\n{source}"
    text = template.render([Message("user", "x")], generation_prompt=True)
    begins = [start for _, start, _ in chat.encoder.control_places(text)]
    before = "bos_token" if chat.adds_bos and not text.startswith(str(chat.tokenizer.bos_token)) else ""
    if chat.encoder.space_first and 0 not in begins and not text.startswith(" "):
        before = f"{before} ~ ' '" if before else "' '"
    if before:
        source = f"{{{{- {before} -}}}}\n{source}"
    if system_prompt is not None:
        source = _DEFAULT_SYSTEM.format(text=f"'{system_prompt.translate(_ESCAPES)}'") + source
    return source


def equivalent_conversations(messages: Sequence[Message], system_prompt: str | None) -> list[Sequence[Message]]:
    """Return the conversations that must render alike: this one, with and without its default system turn."""
    place = 1 if messages[0].role == "tools" else 0
    if system_prompt is None or messages[place] != Message("system", system_prompt):
        return [messages]
    return [messages, [*messages[:place], *messages[place + 1 :]]]


def count_equal_renderings(
    tokenizer: Any,
    template: Template,
    conversations: Sequence[Sequence[Message]],
    ids: Sequence[Sequence[int]],
    system_prompt: str | None = None,
) -> int:
    """Return the number of conversations that a tokenizer's own template renders to these ids, up to the answer.

    Conversations that begin with ``system_prompt`` must also render to them without it.
    ``template`` is the training template: it decides which functions are the base's built-in ones.
    """

    def rendered(messages: Sequence[Message]) -> list[int]:
        given = template.variables(messages)
        turns = given.pop("messages")
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **given))

    return sum(
        all(rendered(asked) == list(wanted) for asked in equivalent_conversations(messages, system_prompt))
        for messages, wanted in zip(conversations, ids, strict=True)
    )
