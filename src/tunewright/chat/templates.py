"""Rendering of chat templates with the date pinned, and ordinary conversations to compare a rendering with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import jinja2

from tunewright.chat.tool_calls import declared_functions, is_builtin
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.data.examples import Message, Role

TemplateKind = Literal["own", "plain"]
ToolsKind = Literal["own", "hermes"]
ThinkingWay = Literal["reasoning_content", "thinking", "reasoning", "parts", "tags"]
"""How a template takes a turn's thinking: under this key, as a part of the content (Mistral), or as text in it."""

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
HERMES_INSTEAD = "Set chat.tools to hermes, which writes functions and calls as text."
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

_HERMES_PRELUDE = """\
{%- if tools %}
    {%- set hermes = namespace(turns=[], results=[], declared='') %}
    {%- for tool in tools %}
        {%- set hermes.declared = hermes.declared ~ (tool | tojson) ~ '\\n' %}
    {%- endfor %}
    {%- set hermes.declared = 'You may call functions. Their signatures are in <tools></tools>:\\n<tools>\\n'
        ~ hermes.declared
        ~ '</tools>\\nWrite each call as a JSON object with its name and arguments in <tool_call></tool_call>:\\n'
        ~ '<tool_call>\\n{"name": <function name>, "arguments": <object of arguments>}\\n</tool_call>' %}
    {%- if messages[0]['role'] == 'system' %}
        {%- set hermes.declared = messages[0]['content'] ~ '\\n\\n' ~ hermes.declared %}
        {%- set messages = messages[1:] %}
    {%- endif %}
    {%- set hermes.turns = [{'role': 'system', 'content': hermes.declared}] %}
    {%- for message in messages %}
        {%- if message['role'] == 'tool' %}
            {%- set hermes.results = hermes.results
                + ['<tool_response>\\n' ~ message['content'] ~ '\\n</tool_response>'] %}
            {%- if loop.last or loop.nextitem['role'] != 'tool' or RESULT_ROLE == 'tool' %}
                {%- set hermes.turns = hermes.turns
                    + [{'role': RESULT_ROLE, 'content': hermes.results | join('\\n')}] %}
                {%- set hermes.results = [] %}
            {%- endif %}
        {%- elif message['tool_calls'] %}
            {%- set written = namespace(parts=[message['content']] if message['content'] else []) %}
            {%- for call in message['tool_calls'] %}
                {%- set written.parts = written.parts
                    + ['<tool_call>\\n{"name": ' ~ (call['function']['name'] | tojson) ~ ', "arguments": '
                       ~ (call['function']['arguments'] | tojson) ~ '}\\n</tool_call>'] %}
            {%- endfor %}
            {%- set hermes.turns = hermes.turns
                + [{'role': message['role'], 'content': written.parts | join('\\n')}] %}
        {%- else %}
            {%- set hermes.turns = hermes.turns + [message] %}
        {%- endif %}
    {%- endfor %}
    {%- set messages = hermes.turns %}
    {%- set tools = none %}
{%- endif %}
"""
"""Functions, calls and results in the Hermes format, for templates without a tool form.

The format is from NousResearch's Hermes 2 Pro and later: declarations in ``<tools>``, calls in ``<tool_call>``,
results in ``<tool_response>``, all of them text in turns that every template has. It is a Jinja source in front
of the base's own, so that exported files render conversations with functions as training did.
"""


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
    tools: ToolsKind = "own"
    """The form of functions, calls and results; ``source`` renders it."""
    thinking: ThinkingWay | None = None
    """How it takes a turn's thinking; None if it drops it."""

    @classmethod
    def of(cls, tokenizer: Any, kind: TemplateKind, today: date, tools: ToolsKind = "own") -> Template:
        """Return the tokenizer's own template, or the plain form."""
        name = str(tokenizer.name_or_path) or type(tokenizer).__name__
        source = PLAIN_FORM if kind == "plain" else _own(tokenizer, name)
        special = {key: str(text) for key, text in sorted(tokenizer.special_tokens_map.items())}
        template = cls(kind, source, special, today, name)
        template._compiled()
        if tools == "hermes":
            source = hermes_source(source, tool_role=template._has_tool_role())
            template = replace(template, source=source, tools=tools)
        return template if kind == "plain" else replace(template, thinking=_thinking_way(template))

    @property
    def uses_date(self) -> bool:
        """True if the rendered text depends on the date."""
        return "strftime_now" in self.source or "date_string" in self.source

    @property
    def has_builtin(self) -> bool:
        """True if the template has a form of its own for Llama's built-in functions."""
        return self.tools == "own" and "builtin_tools" in self.source

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool, options: Mapping[str, Any] = NO_OPTIONS
    ) -> str:
        """Return the conversation as text; with ``generation_prompt``, up to the beginning of the next answer.

        ``options`` are further variables of the template, such as ``enable_thinking``.
        """
        try:
            text = self._compiled().render(
                {
                    **self.special_tokens,
                    **options,
                    **self.variables(messages),
                    "documents": None,
                    "add_generation_prompt": generation_prompt,
                    "strftime_now": datetime.combine(self.today, time()).strftime,
                    "date_string": self.today.strftime("%d %b %Y"),  # the name in Llama's templates
                }
            )
        except Exception as error:
            raise UserError(
                f"The chat template refuses this conversation: {error}",
                where=self.name,
                fix=HERMES_INSTEAD if declared_functions(messages) and self.tools == "own" else PLAIN_INSTEAD,
            ) from error
        return str(text)

    def variables(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Return a conversation as ``apply_chat_template`` takes it: ``messages``, ``tools``, and built-in functions.

        Arguments are objects, and results have their function's name.
        """
        functions = declared_functions(messages)
        builtin = [f["name"] for f in functions if self.has_builtin and is_builtin(f)]
        tools = [{"type": "function", "function": f} for f in functions if f["name"] not in builtin]
        return {
            "messages": _turns(messages, self.thinking),
            "tools": tools or None,
            # Llama 3.1's template tests whether this is defined, not whether it is empty.
            **({"builtin_tools": builtin} if builtin else {}),
        }

    def _has_tool_role(self) -> bool:
        """Return whether the template has a role of its own for results, and writes their text unchanged."""
        asked = [Message("user", "x"), Message("assistant", "x")]
        result = 'a "result"'
        try:
            as_tool = self.render([*asked, Message("tool", result)], generation_prompt=False)
            others = [self.render([*asked, Message(role, result)], generation_prompt=False) for role in _OTHER_ROLES]
        except UserError:
            return False
        return result in as_tool and as_tool not in others

    def _compiled(self) -> Any:
        # transformers' sandbox (cached there), so that templates behave as in apply_chat_template,
        # which has no way to set the date for templates that call strftime_now.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            return _compile_jinja_template(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"The chat template has a syntax error: {error.message}",
                where=f"{self.name}, chat template line {error.lineno}",
                fix=PLAIN_INSTEAD,
            ) from error


_OTHER_ROLES: tuple[Role, ...] = ("user", "assistant")


_THOUGHT, _THEN = "probe thought", "probe answer"


def _thinking_way(template: Template) -> ThinkingWay | None:
    """Return the first way in which the template writes an answer's thinking, and an end after it."""
    turns = [Message("user", "x"), Message("assistant", _THEN, reasoning=_THOUGHT)]
    for way in get_args(ThinkingWay):
        if way == "tags" and "<think>" not in template.source:
            continue
        try:
            text = replace(template, thinking=way).render(turns, generation_prompt=False)
        except UserError:
            continue
        _, _, rest = text.partition(_THOUGHT)
        end, answer, _ = rest.partition(_THEN)
        # A template without parts may write the list itself.
        if answer and end.strip() and _THOUGHT not in rest and "'type'" not in text:
            return cast("ThinkingWay", way)
    return None


def _with_thinking(turn: dict[str, Any], reasoning: str, way: ThinkingWay | None) -> dict[str, Any]:
    if way == "parts":
        parts = [{"type": "thinking", "thinking": [{"type": "text", "text": reasoning}]}]
        text = [{"type": "text", "text": turn["content"]}] if turn["content"] else []
        return {**turn, "content": [*parts, *text]}
    if way == "tags":
        return {**turn, "content": f"<think>\n{reasoning}\n</think>\n\n{turn['content']}"}
    return turn if way is None else {**turn, way: reasoning}


def _turns(messages: Sequence[Message], way: ThinkingWay | None) -> list[dict[str, Any]]:
    """Return the turns as transformers' templates take them: arguments as objects, results with their function."""
    turns = []
    names: dict[str, str] = {}
    for message in messages:
        if message.role == "tools":
            continue
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            turn = _with_thinking(turn, message.reasoning, way)
        if message.calls:
            names |= {call.id: call.name for call in message.calls}
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.loads(call.arguments)},
                }
                for call in message.calls
            ]
        if message.call_id is not None:
            turn["tool_call_id"] = message.call_id
            turn["name"] = names.get(message.call_id)
        turns.append(turn)
    return turns


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


def hermes_source(source: str, *, tool_role: bool) -> str:
    """Return a chat template that writes functions, calls and results in the Hermes format.

    Without a ``tool_role`` in the template, the user's turn holds the results.
    """
    return _HERMES_PRELUDE.replace("RESULT_ROLE", "'tool'" if tool_role else "'user'") + source


Shape = tuple[Message, ...]

PROBES: tuple[tuple[Role, ...], ...] = (
    ("user",),
    ("user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
)
"""Roles of conversations that show a template's control tokens."""


def of_roles(roles: Sequence[Role]) -> Shape:
    """Return an ordinary conversation of these roles."""
    return tuple(Message(role, "x") for role in roles)


def shape_of(messages: Sequence[Message]) -> Shape:
    """Return an ordinary conversation of the same shape: roles, calls of each turn and functions.

    Functions and calls that Llama's templates render in their own form are kept.
    """
    builtin = {f["name"] for f in declared_functions(messages) if is_builtin(f)}
    return tuple(_ordinary(message, builtin) for message in messages)


def _ordinary(message: Message, builtin: set[str]) -> Message:
    if message.role == "tools":
        return Message("tools", _ordinary_functions(message.content))
    reasoning = "x" if message.reasoning else ""
    if not message.calls:
        return Message(message.role, "x", call_id=message.call_id, reasoning=reasoning)
    calls = tuple(
        replace(call, arguments='{"query":"x"}')
        if call.name in builtin
        else replace(call, name="x", arguments='{"x":"x"}')
        for call in message.calls
    )
    return Message(message.role, "x" if message.content else "", calls=calls, reasoning=reasoning)


@lru_cache(maxsize=1024)
def _ordinary_functions(content: str) -> str:
    functions = declared_functions([Message("tools", content)])
    return declarations(f["name"] if is_builtin(f) else "x" for f in functions)


def declarations(names: Iterable[str]) -> str:
    """Return declarations of functions with these names and one parameter, as a message of role ``tools`` has them."""
    return canonical_json(
        [
            {"type": "function", "function": {"name": name, "description": "x", "parameters": _PARAMETERS}}
            for name in names
        ]
    )


_PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}}
