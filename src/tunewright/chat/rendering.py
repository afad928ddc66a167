"""Conversations to token ids and loss mask, shared by training, evaluation and serving.

The base's own chat template decides, and needs no markers of the trained part. An assistant turn is
the text that the rendering with the turn adds to the rendering of its prompt:

    render(messages[:i], generation_prompt=True)        <user> Hi <assistant>
    render(messages[:i + 1], generation_prompt=False)   <user> Hi <assistant> Hello <end>
    trained                                                                   ^^^^^^^^^^^
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from tunewright.chat.encoder import Piece, TextEncoder
from tunewright.chat.templates import NO_OPTIONS, PLAIN_INSTEAD, Shape, Template, shape_of
from tunewright.chat.thinking import ThinkingForm, find_switches, find_thinking_form
from tunewright.chat.tool_calls import signed
from tunewright.chat.tool_form import ToolForm, find_tool_form, has_functions, refuse_undeclared
from tunewright.config import ReasoningMode
from tunewright.core.errors import UserError
from tunewright.data.examples import Message

_MOST_SHAPES = 1000


@dataclass(frozen=True)
class Tokens:
    """Token ids of a conversation, and the loss mask: true for trained tokens."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.loss_mask)


@dataclass(frozen=True)
class RenderedRow:
    """Pieces of a rendered conversation, each with its loss mask, before encoding."""

    segments: tuple[tuple[tuple[Piece, ...], bool], ...]


@dataclass(frozen=True)
class _Turn:
    """An assistant turn: the text of its prompt, and the text up to its end token."""

    prompt: str
    shown: str
    trained: bool
    start: int
    """Where the trained text begins: at the answer, or after its thinking."""


@dataclass(frozen=True)
class Renderer:
    """A tokenizer, its chat template and the tokens that end an answer: conversations to ids and loss mask."""

    tokenizer: Any
    template: Template
    stop_ids: frozenset[int]
    encoder: TextEncoder
    reasoning: ReasoningMode = "train"
    """Use of the turns' thinking."""
    _control_by_shape: dict[tuple[Shape, bool, tuple[Any, ...]], list[int]] = field(default_factory=dict, repr=False)
    _thinking_by_options: dict[tuple[Any, ...], ThinkingForm | None] = field(default_factory=dict, repr=False)

    def prompt(self, messages: Sequence[Message], options: Mapping[str, Any] = NO_OPTIONS) -> tuple[int, ...]:
        """Return the ids of the conversation up to the beginning of the assistant's next answer.

        ``options`` are those of :attr:`switches`.

        Raises:
            UserError: the template refuses this conversation.
        """
        messages = self._with_reasoning(messages)
        hidden, stand_ins = self._hide(messages)
        text = self.template.render(hidden, generation_prompt=True, options=options)
        self._check_control(text, messages, generation_prompt=True, options=options)
        cuts = []
        for place, earlier in zip(_assistant_places(messages), self._prompts(hidden, options), strict=True):
            if text.startswith(earlier):
                cuts.append(len(earlier))
                if messages[place].calls:
                    self._check_answer(text[len(earlier) :], messages[place], stand_ins)
        return self.tokens([self._rendered_row(text, cuts, [], stand_ins)])[0].ids

    def encode(self, messages: Sequence[Message]) -> Tokens:
        """Return the ids and the loss mask of a conversation: assistant turns of weight 1 are trained, with end tokens.

        If a template renders earlier turns differently in longer conversations, only turns rendered
        as in their own prompt are trained; :meth:`rows` covers all turns.

        Raises:
            UserError: the template refuses this conversation, or leaves an answer without an end token.
        """
        messages = self._with_reasoning(_answered(messages))
        hidden, stand_ins = self._hide(messages)
        turns = self._assistant_turns(messages, hidden, stand_ins)
        return self.tokens([self._row(turns[-1].shown, turns, stand_ins)])[0]

    def rows(self, messages: Sequence[Message]) -> list[Tokens]:
        """Return the rows to train on: one row if the conversation grows by appending, else a row for each turn.

        Raises:
            UserError: as :meth:`encode`.
        """
        return self.tokens(self.rendered_rows(messages))

    def rendered_rows(self, messages: Sequence[Message]) -> list[RenderedRow]:
        """Return the rows of a conversation before encoding; :meth:`tokens` encodes many of them at once."""
        messages = self._with_reasoning(_answered(messages))
        hidden, stand_ins = self._hide(messages)
        turns = self._assistant_turns(messages, hidden, stand_ins)
        whole = turns[-1].shown
        if all(whole.startswith(turn.shown) for turn in turns if turn.trained):
            return [self._row(whole, turns, stand_ins)]
        return [
            self._row(turn.shown, [*(replace(each, trained=False) for each in turns[:place]), turn], stand_ins)
            for place, turn in enumerate(turns)
            if turn.trained
        ]

    def tokens(self, rendered: Sequence[RenderedRow]) -> list[Tokens]:
        """Encode rendered rows; each distinct text is encoded once."""
        runs = (p for row in rendered for pieces, _ in row.segments for p in pieces if isinstance(p, str))
        known = self.encoder.ids(runs)
        rows = []
        for row in rendered:
            ids: list[int] = []
            mask: list[bool] = []
            for pieces, trained in row.segments:
                for piece in pieces:
                    if isinstance(piece, str):
                        ids += known[piece]
                    else:
                        ids.append(piece)
                mask += [trained] * (len(ids) - len(mask))
            if self.adds_bos and ids[:1] != [self.bos_id]:
                ids.insert(0, self.bos_id)
                mask.insert(0, False)
            rows.append(Tokens(tuple(ids), tuple(mask)))
        return rows

    def _signed(self, pieces: Iterable[Piece]) -> str:
        """Return pieces of an answer with signs for the marks of calls and thinking."""
        signs: Mapping[int, str] = {} if self.thinking is None else self.thinking.signs
        marked = (signs.get(piece, piece) if isinstance(piece, int) else piece for piece in pieces)
        return signed(marked, self.encoder.control_names)

    @property
    def thinking(self) -> ThinkingForm | None:
        """The form in which the template writes thinking; None if it has none."""
        return self.thinking_with(NO_OPTIONS)

    def thinking_with(self, options: Mapping[str, Any]) -> ThinkingForm | None:
        """Return the form of thinking in answers to prompts with these options; None if they have none."""
        key = tuple(options.items())
        if key not in self._thinking_by_options:
            form = find_thinking_form(self.template, self.encoder, self.answer_in, options)
            self._thinking_by_options[key] = form
        return self._thinking_by_options[key]

    @cached_property
    def switches(self) -> dict[str, tuple[bool | str, ...]]:
        """The template's options on thinking, each with its values."""
        return find_switches(self.template)

    @cached_property
    def tool_form(self) -> ToolForm:
        """The form in which the template writes calls."""
        return find_tool_form(self.template, self.encoder, self.answer_in)

    @property
    def bos_id(self) -> int:
        """Id of the BOS token; -1 without one."""
        return -1 if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @cached_property
    def adds_bos(self) -> bool:
        """True if the tokenizer adds BOS to each text, so that BOS is added if the template does not write it."""
        ids: list[int] = self.tokenizer("a")["input_ids"]
        return ids[0] == self.bos_id

    @property
    def _end_tokens(self) -> list[str]:
        return sorted(str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.stop_ids)

    def _with_reasoning(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the turns with the thinking that the template writes."""
        if not any(message.reasoning for message in messages):
            return messages
        if self.reasoning == "strip":
            return [replace(message, reasoning="") for message in messages]
        if self.thinking is None:
            raise UserError(
                "The chat template has no form for thinking (reasoning_content)",
                where=self.template.name,
                fix="Set chat.reasoning to strip, or use a base whose chat template writes thinking.",
            )
        return messages

    def _hide(self, messages: Sequence[Message]) -> tuple[list[Message], dict[int, str]]:
        if has_functions(messages):
            refuse_undeclared(messages)
            _ = self.tool_form
        hidden, stand_ins = self.encoder.hide(messages)
        if stand_ins and has_functions(messages):
            _require_json(hidden, stand_ins.values())
        return hidden, stand_ins

    def _assistant_turns(
        self, messages: Sequence[Message], hidden: Sequence[Message], stand_ins: dict[int, str]
    ) -> list[_Turn]:
        turns = []
        for place, prompt in zip(_assistant_places(messages), self._prompts(hidden), strict=True):
            shown = self.template.render(hidden[: place + 1], generation_prompt=False)
            self._check_control(shown, messages[: place + 1], generation_prompt=False)
            answer = self.answer_in(prompt, shown)
            if messages[0].role == "tools":
                self._check_answer(answer, messages[place], stand_ins)
            start = len(prompt)
            if self.reasoning == "mask" and messages[place].reasoning:
                assert self.thinking is not None, "_with_reasoning() was called before"
                start += answer.index(self.thinking.end) + len(self.thinking.end)
            turns.append(_Turn(prompt, prompt + answer, messages[place].weight == 1, start))
        return turns

    def answer_in(self, prompt: str, shown: str) -> str:
        """Return the text that the answered conversation adds to its prompt, up to its end token."""
        answer = shown[self._answer_start(prompt, shown) :]
        return answer[: self._answer_end(answer)]

    def _check_answer(self, rendered: str, message: Message, stand_ins: dict[int, str]) -> None:
        """Check that a rendered answer, with text after it or without, reads back as its turn."""
        pieces = self.encoder.pieces(rendered[: self._answer_end(rendered)], stand_ins, start=False)
        text = self._signed(pieces)
        if self.thinking is not None:
            _, text = self.thinking.split(text, opened=self.thinking.in_prompt)
        self.tool_form.check(text, message, self.template)

    def _answer_start(self, prompt: str, shown: str) -> int:
        """Return the beginning of the answer in ``shown``.

        Mistral's public templates render the system text in the last user turn only while that turn
        is unanswered. The prompt is then not a prefix, and the answer begins after the last
        occurrence of the prompt's end: its last control token and the text after it.
        """
        if shown.startswith(prompt):
            return len(prompt)
        control = self.encoder.control_places(prompt)
        mark = prompt[control[-1][1] :] if control else ""
        place = shown.rfind(mark) if mark else -1
        if place < 0 or self._control_ids(prompt) != self._control_ids(shown[: place + len(mark)]):
            raise UserError(
                "Cannot locate the answer, because the chat template renders the prompt differently once it is "
                f"answered (the prompt ends with {prompt[-20:]!r})",
                where=self.template.name,
                fix=PLAIN_INSTEAD,
            )
        return place + len(mark)

    def _prompts(self, messages: Sequence[Message], options: Mapping[str, Any] = NO_OPTIONS) -> list[str]:
        return [
            self.template.render(messages[:place], generation_prompt=True, options=options)
            for place in _assistant_places(messages)
        ]

    def _answer_end(self, answer: str) -> int:
        """Return the end of the answer's end token. Later text is never generated, so it is not trained."""
        ends = [end for token, _, end in self.encoder.control_places(answer) if token in self.stop_ids]
        if ends:
            return ends[0]
        names = ", ".join(self._end_tokens)
        raise UserError(
            f"The chat template does not end answers with an end token of the base ({names}), so the model would not "
            "learn to stop",
            where=self.template.name,
            fix=PLAIN_INSTEAD,
        )

    def _row(self, text: str, turns: Sequence[_Turn], stand_ins: dict[int, str]) -> RenderedRow:
        cuts = [len(turn.prompt) for turn in turns if text.startswith(turn.prompt)]
        trained = [(turn.start, len(turn.shown)) for turn in turns if turn.trained and text.startswith(turn.shown)]
        return self._rendered_row(text, cuts, trained, stand_ins)

    def _rendered_row(
        self, text: str, cuts: Sequence[int], trained: Sequence[tuple[int, int]], stand_ins: dict[int, str]
    ) -> RenderedRow:
        """Split ``text`` at the cuts, so that no token spans one and a prompt's ids do not depend on the answer."""
        bounds = sorted({0, len(text), *cuts, *(place for span in trained for place in span)})
        spans = set(trained)
        return RenderedRow(
            tuple(
                (tuple(self.encoder.pieces(text[start:end], stand_ins, start=start == 0)), (start, end) in spans)
                for start, end in pairwise(bounds)
            )
        )

    def _check_control(
        self,
        text: str,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> None:
        """Check that the control tokens depend on the conversation's shape only, not on its texts."""
        shape = shape_of(messages), generation_prompt, tuple(options.items())
        if shape not in self._control_by_shape:
            if len(self._control_by_shape) >= _MOST_SHAPES:
                self._control_by_shape.clear()  # the number of shapes on a server is unbounded
            ordinary = self.template.render(shape[0], generation_prompt=generation_prompt, options=options)
            self._control_by_shape[shape] = self._control_ids(ordinary)
        if self._control_ids(text) != self._control_by_shape[shape]:
            raise UserError(
                "The chat template renders these texts with other control tokens than ordinary texts",
                where=self.template.name,
                fix=PLAIN_INSTEAD,
            )

    def _control_ids(self, text: str) -> list[int]:
        return [token for token, _, _ in self.encoder.control_places(text)]


def _answered(messages: Sequence[Message]) -> Sequence[Message]:
    if not messages or messages[-1].role != "assistant":
        raise UserError("The last turn must be the assistant's", where="messages")
    return messages


def _require_json(hidden: Sequence[Message], found: Iterable[str]) -> None:
    """Check that declarations and arguments are still JSON without the control tokens in their strings."""
    try:
        for message in hidden:
            for text in [message.content] * (message.role == "tools") + [call.arguments for call in message.calls]:
                json.loads(text)
    except json.JSONDecodeError:
        raise UserError(
            f"A control token of the base includes JSON syntax of a call or declaration: "
            f"{' or '.join(sorted(map(repr, found)))}",
            fix="Functions need a base whose tokenizer has no such token.",
        ) from None


def _assistant_places(messages: Sequence[Message]) -> list[int]:
    return [place for place, message in enumerate(messages) if message.role == "assistant"]
