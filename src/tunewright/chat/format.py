"""One way from a conversation to token ids and the tokens to train, for training, evaluation and serving alike.

The base's own chat template decides. The trained part needs no markers in the template: an assistant turn is what a
rendering with the turn adds to the rendering that asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from itertools import pairwise
from typing import Any

from tunewright.chat.templates import PLAIN_INSTEAD, Template, TemplateKind
from tunewright.chat.text import Piece, TextEncoder
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.data.examples import Message, Role

_MOST_SHAPES = 1000
_SHAPES: tuple[tuple[Role, ...], ...] = (
    ("user",),
    ("user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
)


@dataclass(frozen=True)
class Tokens:
    """A conversation as token ids, and for each whether it is trained."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.loss_mask)


@dataclass(frozen=True)
class Layout:
    """One row to be: pieces of a rendered conversation in order, each with whether it is trained."""

    segments: tuple[tuple[tuple[Piece, ...], bool], ...]


@dataclass(frozen=True)
class UserTurn:
    """What a model needs to write a conversation's first user turn itself."""

    opening: tuple[int, ...]
    """Ids up to where the user's text begins."""
    end_ids: frozenset[int]
    """Tokens that end it."""
    end_text: str | None
    """The ordinary text that ends it, of a template that has no token for that (Llama 2's ``[/INST]``)."""
    begin_text: str | None
    """The ordinary text that then begins it: a base that goes on after an answer writes the next turn."""


@dataclass(frozen=True)
class _Turn:
    """An assistant turn: the text that asks for it, and the text that ends with its end token."""

    prompt: str
    shown: str
    trained: bool


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer, its chat template and the tokens that end an answer.

    Use :func:`chat_format` or :func:`tunewright.chat.open_chat` to make one.
    """

    tokenizer: Any
    template: Template
    stop_ids: frozenset[int]
    encoder: TextEncoder
    _control_by_shape: dict[tuple[tuple[Role, ...], bool], list[int]] = field(default_factory=dict, repr=False)

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of the conversation so far, up to where the assistant's next answer begins.

        Raises:
            UserError: the template refuses this conversation.
        """
        hidden, stands_for = self.encoder.hide(messages)
        text = self.template.render(hidden, generation_prompt=True)
        cuts = [len(earlier) for earlier in self._prompts(hidden) if text.startswith(earlier)]
        self._check_control(text, messages, generation_prompt=True)
        return self.tokens([self._layout(text, cuts, [], stands_for)])[0].ids

    def continuation(self, text: str) -> tuple[int, ...]:
        """Ids of text to go on from as it stands, without the template; what looks like a control token stays text.

        Raises:
            UserError: the tokenizer makes a control token out of plain text.
        """
        start = " " if self.encoder.space_first and not text.startswith(" ") else ""
        ((_, ids),) = self.encoder.ids([start + text]).items()
        return (self.bos_id, *ids) if self.adds_bos else tuple(ids)

    def user_turn(self) -> UserTurn:
        """Return how the first user turn begins and ends, after whatever system turn the template writes by itself."""
        mark = "\ue000"  # private use: no template writes it, and none takes it for white space
        text = self.template.render([Message("user", mark)], generation_prompt=True)
        before, after = text.split(mark)
        # A space before a word belongs to the word's first token: "[INST] " ends with a token that no text begins with.
        opening = self.tokens([self._layout(before.rstrip(" "), [], [], {})])[0].ids
        control = self.encoder.control_places(after)
        if control and not after[: control[0][1]].strip():
            return UserTurn(opening, self.stop_ids | {control[0][0]}, None, None)
        ends = [end for _, _, end in self.encoder.control_places(before)]
        begin_text = before[max(ends, default=0) :].strip().split("\n")[-1]
        return UserTurn(opening, self.stop_ids, after.strip().split("\n")[0], begin_text)

    def encode(self, messages: Sequence[Message]) -> Tokens:
        """Ids of the whole conversation, and which are trained: assistant turns of weight 1 with their end tokens.

        Of a template that shows earlier turns differently as the conversation grows, only the turns are trained that
        are shown here as they were asked for; :meth:`rows` has them all.

        Raises:
            UserError: the template refuses this conversation, or leaves an answer without an end token.
        """
        hidden, stands_for = self.encoder.hide(_answered(messages))
        turns = self._assistant_turns(hidden)
        return self.tokens([self._row(turns[-1].shown, turns, stands_for)])[0]

    def rows(self, messages: Sequence[Message]) -> list[Tokens]:
        """What to train on: the whole conversation as one row where it grows by appending, else a row for each turn.

        Raises:
            UserError: as :meth:`encode`.
        """
        return self.tokens(self.layouts(messages))

    def layouts(self, messages: Sequence[Message]) -> list[Layout]:
        """The rows before their ids are known; :meth:`tokens` turns many of them into ids faster than one by one."""
        hidden, stands_for = self.encoder.hide(_answered(messages))
        turns = self._assistant_turns(hidden)
        whole = turns[-1].shown
        if all(whole.startswith(turn.shown) for turn in turns if turn.trained):
            return [self._row(whole, turns, stands_for)]
        return [
            self._row(turn.shown, [*_untrained(turns[:place]), turn], stands_for)
            for place, turn in enumerate(turns)
            if turn.trained
        ]

    def tokens(self, layouts: Sequence[Layout]) -> list[Tokens]:
        """Rows as ids and masks; each distinct text is encoded once.

        Raises:
            UserError: the tokenizer makes a control token out of plain text.
        """
        runs = (p for row in layouts for pieces, _ in row.segments for p in pieces if isinstance(p, str))
        known = self.encoder.ids(runs)
        rows = []
        for row in layouts:
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

    def text(self, ids: Sequence[int]) -> str:
        """Return what an answer's ids say, without its special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def texts(self, many: Sequence[Sequence[int]]) -> list[str]:
        """Return what each list of ids says, special tokens included."""
        texts: list[str] = self.tokenizer.backend_tokenizer.decode_batch(
            [list(ids) for ids in many], skip_special_tokens=False
        )
        return texts

    @property
    def bos_id(self) -> int:
        """The token that begins a text; -1 where the tokenizer has none."""
        return -1 if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @cached_property
    def adds_bos(self) -> bool:
        """True if the tokenizer itself puts BOS before every text; where the template doesn't write it, we do."""
        ids: list[int] = self.tokenizer("a")["input_ids"]
        return ids[0] == self.bos_id

    @cached_property
    def writes_bos(self) -> bool:
        """True if conversations begin with BOS."""
        return self._neutral_ids(("user",))[:1] == [self.bos_id] or self.adds_bos

    @cached_property
    def bos_opens_turns(self) -> bool:
        """True if the template writes BOS more than once, as a mark of turns (Llama 2; SmolLM2's ``<|im_start|>``)."""
        return any(self._control_ids(text).count(self.bos_id) > 1 for text in self._neutrals())

    @cached_property
    def description(self) -> dict[str, Any]:
        """All that decides the rendering, as JSON; lineages keep it so that a difference can be named."""
        probes = [self._probe(roles) for roles in self._accepted]
        return {
            "kind": self.template.kind,
            "template": self.template.source,
            "special_tokens": dict(self.template.special_tokens),
            "date": self.template.today.isoformat() if self.template.uses_date else None,
            "end_tokens": self._end_tokens,
            "probe": digest(probes),
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the description: equal digests render every conversation to the same ids."""
        return digest(self.description)

    @property
    def _end_tokens(self) -> list[str]:
        return sorted(str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.stop_ids)

    @cached_property
    def used_control_ids(self) -> frozenset[int]:
        """The control tokens that conversations are written with."""
        return frozenset(token for text in self._neutrals() for token in self._control_ids(text))

    def _assistant_turns(self, messages: Sequence[Message]) -> list[_Turn]:
        turns = []
        for place, prompt in zip(_assistant_places(messages), self._prompts(messages), strict=True):
            shown = self.template.render(messages[: place + 1], generation_prompt=False)
            self._check_control(shown, messages[: place + 1], generation_prompt=False)
            answer = shown[self._answer_start(prompt, shown) :]
            answer = answer[: self._answer_end(answer)]
            turns.append(_Turn(prompt, prompt + answer, messages[place].weight == 1))
        return turns

    def _answer_start(self, prompt: str, shown: str) -> int:
        """Where in ``shown`` the answer begins.

        Mistral's public templates show the system text in the last user turn only while that is unanswered: then the
        answer begins where what ends the prompt (its last control token, and what follows that) stands last.
        """
        if shown.startswith(prompt):
            return len(prompt)
        control = self.encoder.control_places(prompt)
        mark = prompt[control[-1][1] :] if control else ""
        place = shown.rfind(mark) if mark else -1
        if place < 0 or self._control_ids(prompt) != self._control_ids(shown[: place + len(mark)]):
            raise UserError(
                "the chat template shows the prompt differently once it is answered: what of it is the answer "
                f"cannot be told (the prompt ends with {prompt[-20:]!r})",
                where=self.template.name,
                fix=PLAIN_INSTEAD,
            )
        return place + len(mark)

    def _prompts(self, messages: Sequence[Message]) -> list[str]:
        return [self.template.render(messages[:place], generation_prompt=True) for place in _assistant_places(messages)]

    def _answer_end(self, answer: str) -> int:
        """Where the answer's end token ends. What a template writes after it is never generated, so not trained."""
        ends = [end for token, _, end in self.encoder.control_places(answer) if token in self.stop_ids]
        if ends:
            return ends[0]
        names = ", ".join(self._end_tokens)
        raise UserError(
            f"the chat template ends the answer with none of the base's end tokens ({names}): the model would never "
            "learn to stop",
            where=self.template.name,
            fix=PLAIN_INSTEAD,
        )

    def _row(self, text: str, turns: Sequence[_Turn], stands_for: dict[int, str]) -> Layout:
        cuts = [len(turn.prompt) for turn in turns if text.startswith(turn.prompt)]
        trained = [
            (len(turn.prompt), len(turn.shown)) for turn in turns if turn.trained and text.startswith(turn.shown)
        ]
        return self._layout(text, cuts, trained, stands_for)

    def _layout(
        self, text: str, cuts: Sequence[int], trained: Sequence[tuple[int, int]], stands_for: dict[int, str]
    ) -> Layout:
        """Pieces of ``text``; no token straddles a cut, since a prompt's ids don't depend on the answer to come."""
        bounds = sorted({0, len(text), *cuts, *(place for span in trained for place in span)})
        spans = set(trained)
        return Layout(
            tuple(
                (tuple(self.encoder.pieces(text[start:end], stands_for, start=start == 0)), (start, end) in spans)
                for start, end in pairwise(bounds)
            )
        )

    def _check_control(self, text: str, messages: Sequence[Message], *, generation_prompt: bool) -> None:
        """Which control tokens a conversation has is a matter of its roles, never of what its messages say."""
        shape = (tuple(m.role for m in messages), generation_prompt)
        if shape not in self._control_by_shape:
            if len(self._control_by_shape) >= _MOST_SHAPES:
                self._control_by_shape.clear()  # a server meets shapes without end
            self._control_by_shape[shape] = self._control_ids(self._neutral(*shape))
        if self._control_ids(text) != self._control_by_shape[shape]:
            raise UserError(
                "the chat template makes other control tokens of these texts than of ordinary ones",
                where=self.template.name,
                fix=PLAIN_INSTEAD,
            )

    def _control_ids(self, text: str) -> list[int]:
        return [token for token, _, _ in self.encoder.control_places(text)]

    def _neutral(self, roles: Sequence[Role], generation_prompt: bool = False) -> str:
        return self.template.render([Message(role, "x") for role in roles], generation_prompt=generation_prompt)

    def _neutral_ids(self, roles: Sequence[Role]) -> list[int]:
        return self._control_ids(self._neutral(roles, generation_prompt=roles[-1] == "user"))

    def _probe(self, roles: Sequence[Role]) -> list[int] | None:
        """Ids of a conversation whose texts try a tokenizer's rules; None where the template refuses it."""
        messages = [Message(role, f" {role}\n\n1234 d'été  <s>[INST]<|eot_id|> 🙂 ") for role in roles]
        try:
            return list(self.prompt(messages) if roles[-1] == "user" else self.encode(messages).ids)
        except UserError:
            return None

    @cached_property
    def _accepted(self) -> list[tuple[Role, ...]]:
        """The shapes of conversation, of a few that tell templates apart, that the template renders."""
        accepted: list[tuple[Role, ...]] = []
        for roles in _SHAPES:
            try:
                self._neutral(roles)
            except UserError:
                continue
            accepted.append(roles)
        return accepted

    def _neutrals(self) -> list[str]:
        return [self._neutral(roles) for roles in self._accepted]


def chat_format(tokenizer: Any, *, stop_ids: frozenset[int], kind: TemplateKind, today: date) -> ChatFormat:
    """Return the format that this tokenizer's conversations have.

    Raises:
        UserError: no template (where its own is asked for), a template that cannot be used, or a tokenizer whose
            rules are not understood.
    """
    template = Template.of(tokenizer, kind, today)
    neutral = template.render([Message("user", "x")], generation_prompt=True)
    chat = ChatFormat(tokenizer, template, stop_ids, TextEncoder(tokenizer, neutral))
    _check_rules(chat)
    return chat


def _check_rules(chat: ChatFormat) -> None:
    """Hold the encoder to the tokenizer's own call, on a text where the two may not differ, and try an answer."""
    text = chat.template.render([Message("user", "What's  new,\n\nZoë?")], generation_prompt=True)
    (tokens,) = chat.tokens([chat._layout(text, [], [], {})])
    own: list[int] = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    ours = list(tokens.ids)
    if ours not in (own, [chat.bos_id, *own]):
        raise UserError(
            "the tokenizer follows rules that are not understood", where=chat.template.name, fix="Use another base."
        )
    if ours[:2] == [chat.bos_id] * 2:
        raise UserError(
            "the chat template writes the beginning-of-text token twice", where=chat.template.name, fix=PLAIN_INSTEAD
        )
    chat.encode([Message("user", "x"), Message("assistant", "x")])


def _answered(messages: Sequence[Message]) -> Sequence[Message]:
    if not messages or messages[-1].role != "assistant":
        raise UserError("a conversation to train on ends with the assistant's turn", where="messages")
    return messages


def _assistant_places(messages: Sequence[Message]) -> list[int]:
    return [place for place, message in enumerate(messages) if message.role == "assistant"]


def _untrained(turns: Sequence[_Turn]) -> list[_Turn]:
    return [_Turn(turn.prompt, turn.shown, trained=False) for turn in turns]
