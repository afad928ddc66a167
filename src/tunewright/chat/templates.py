"""Rendering of chat templates, with the date pinned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any, Literal

import jinja2

from tunewright.core.errors import UserError
from tunewright.data.examples import Message

TemplateKind = Literal["own", "plain"]

PLAIN_INSTEAD = "Correct the template in the base's tokenizer files, or set chat.template to plain."

PLAIN_FORM = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}
    {%- else %}
        {{- '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\\n' }}
{%- endif %}
"""
"""Template for bases without one: the headings of Stanford Alpaca (Taori et al. 2023), which are ordinary text, with
only the special tokens that pre-training puts around each document."""


@dataclass(frozen=True)
class Template:
    """A Jinja chat template with its other variables."""

    kind: TemplateKind
    source: str
    special_tokens: Mapping[str, str]
    """Special tokens of the tokenizer, by their names in templates (``bos_token``, …)."""
    today: date
    """Date for templates that use it."""
    name: str
    """Name of the tokenizer, for messages."""

    @classmethod
    def of(cls, tokenizer: Any, kind: TemplateKind, today: date) -> Template:
        """Return the tokenizer's own template, or the plain form.

        Raises:
            UserError: no template, several without a default, or a syntax error in it.
        """
        name = str(tokenizer.name_or_path) or type(tokenizer).__name__
        source = PLAIN_FORM if kind == "plain" else _own(tokenizer, name)
        special = {key: str(text) for key, text in sorted(tokenizer.special_tokens_map.items())}
        template = cls(kind, source, special, today, name)
        template._compiled()
        return template

    @property
    def uses_date(self) -> bool:
        """True if the rendered text depends on the date."""
        return "strftime_now" in self.source or "date_string" in self.source

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """Return the conversation as text; with ``generation_prompt``, up to the beginning of the next answer.

        Raises:
            UserError: the template refuses this conversation.
        """
        try:
            text = self._compiled().render(
                {
                    **self.special_tokens,
                    "messages": [{"role": m.role, "content": m.content} for m in messages],
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": generation_prompt,
                    "strftime_now": datetime.combine(self.today, time()).strftime,
                    "date_string": self.today.strftime("%d %b %Y"),  # the name in Llama's templates
                }
            )
        except Exception as error:
            raise UserError(
                f"The chat template refuses this conversation: {error}", where=self.name, fix=PLAIN_INSTEAD
            ) from error
        return str(text)

    def _compiled(self) -> Any:
        # transformers' sandbox (cached there), so that templates behave as in apply_chat_template, which has no way to
        # set the date for templates that call strftime_now.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            return _compile_jinja_template(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"The chat template has a syntax error: {error.message}",
                where=f"{self.name}, chat template line {error.lineno}",
                fix=PLAIN_INSTEAD,
            ) from error


def _own(tokenizer: Any, name: str) -> str:
    source = tokenizer.chat_template
    if isinstance(source, dict):
        if "default" not in source:
            named = ", ".join(sorted(source))
            raise UserError(f"No default among the chat templates {named}", where=name, fix=PLAIN_INSTEAD)
        source = source["default"]
    if not source:
        raise UserError(
            "The tokenizer has no chat template",
            where=name,
            fix="Use the instruction-tuned variant of this base, or set chat.template to plain.",
        )
    if not isinstance(source, str):
        raise UserError(f"The chat template must be text (got {type(source).__name__})", where=name, fix=PLAIN_INSTEAD)
    return source
