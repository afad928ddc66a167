"""The chat template that goes with an exported model: it renders what training rendered, wherever it is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tunewright.chat import ChatFormat
from tunewright.data.examples import Message
from tunewright.errors import UserError

_ASKS_FOR_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


def exported_template(chat: ChatFormat) -> str:
    """The Jinja template of the chat format, with what else decides its rendering written into it.

    That is the pinned date (`chat.date`), and the beginning-of-text token where the tokenizer writes it and the
    template does not, as engines encode a rendered template without adding any; and sentencepiece's space before a
    text's first word.

    Raises:
        UserError: a template that works out its date.
    """
    template = chat.template
    source = _ASKS_FOR_TODAY.sub(lambda call: repr(template.today.strftime(call["format"])), template.source)
    if "strftime_now(" in source:
        raise UserError(
            "the chat template works out its date, which cannot be pinned in an exported one",
            where=template.name,
            fix="Mend the template in the base's tokenizer files.",
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
    return source


def rendered_alike(tokenizer: Any, conversations: Sequence[Sequence[Message]], ids: Sequence[Sequence[int]]) -> int:
    """How many conversations a tokenizer's own template renders to these ids, up to where the answer begins."""
    alike = 0
    for messages, wanted in zip(conversations, ids, strict=True):
        turns = [{"role": m.role, "content": m.content} for m in messages]
        found = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        alike += list(found) == list(wanted)
    return alike
