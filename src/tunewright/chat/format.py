"""The chat format of a base: conversations as ids, generated ids as answers, and the format's identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from tunewright.chat.encoder import Piece
from tunewright.chat.rendering import Renderer
from tunewright.chat.templates import PROBES, of_roles
from tunewright.chat.tool_calls import declared_functions, numbered, without_signs
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.data.examples import Message, Role


@dataclass(frozen=True)
class UserTurn:
    """Token ids and texts that let a model generate a conversation's first user turn."""

    opening: tuple[int, ...]
    """Ids up to the beginning of the user's text."""
    end_ids: frozenset[int]
    """Ids that end the turn."""
    end_text: str | None
    """Ordinary text that ends the turn, if the template has no token for it (Llama 2's ``[/INST]``)."""
    begin_text: str | None
    """Ordinary text that begins the turn, which a base writes if it does not end its answer."""


@dataclass(frozen=True)
class ChatFormat(Renderer):
    """A base's form of conversations.

    Create one with :func:`chat_format` or :func:`tunewright.chat.open_chat`.
    """

    def continuation(self, text: str) -> tuple[int, ...]:
        """Return the ids of text to continue, without the template; text that looks like a control token stays text."""
        start = " " if self.encoder.space_first and not text.startswith(" ") else ""
        ((_, ids),) = self.encoder.ids([start + text]).items()
        return (self.bos_id, *ids) if self.adds_bos else tuple(ids)

    def user_turn(self) -> UserTurn:
        """Return the beginning and end of the first user turn, after the template's default system turn, if any."""
        mark = "\ue000"  # private use: in no template, and not white space
        text = self.template.render([Message("user", mark)], generation_prompt=True)
        before, after = text.split(mark)
        # A space belongs to the first token of the word after it, so "[INST] " would end with a wrong token.
        opening = self.tokens([self._rendered_row(before.rstrip(" "), [], [], {})])[0].ids
        control = self.encoder.control_places(after)
        if control and not after[: control[0][1]].strip():
            return UserTurn(opening, self.stop_ids | {control[0][0]}, None, None)
        ends = [end for _, _, end in self.encoder.control_places(before)]
        begin_text = before[max(ends, default=0) :].strip().split("\n")[-1]
        return UserTurn(opening, self.stop_ids, after.strip().split("\n")[0], begin_text)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def answer(
        self, ids: Sequence[int], conversation: Sequence[Message], rest: str = "", *, opened: bool | None = None
    ) -> Message:
        """Return the assistant's turn that generated ids spell, with its calls if the conversation declares functions.

        The messages of the answered ``conversation`` number the calls; ``rest`` is text after the ids. ``opened``
        says whether the ids begin within the thinking (None: as after a prompt).
        """
        thinking = self.thinking
        form = self.tool_form.form if declared_functions(conversation) else None
        if form is None and thinking is None:
            return Message("assistant", self.text(ids) + rest)
        marks = {*(form.control.values() if form else ()), *(thinking.signs if thinking else ())}
        pieces: list[Piece] = []
        for mark, grouped in groupby(ids, marks.__contains__):
            run = list(grouped)
            pieces += run if mark else [self.tokenizer.backend_tokenizer.decode(run, skip_special_tokens=True)]
        reasoning, text = "", self._signed(pieces) + rest
        if thinking is not None:
            reasoning, text = thinking.split(text, opened=thinking.in_prompt if opened is None else opened)
        read = None if form is None else form.read(text)
        if read is None:
            content = self.text(ids) + rest if thinking is None else without_signs(text)
            return Message("assistant", content, reasoning=reasoning)
        content, calls = read
        return Message("assistant", content, calls=numbered(calls, conversation), reasoning=reasoning)

    def texts(self, many: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids, including special tokens."""
        texts: list[str] = self.tokenizer.backend_tokenizer.decode_batch(
            [list(ids) for ids in many], skip_special_tokens=False
        )
        return texts

    @cached_property
    def writes_bos(self) -> bool:
        """True if conversations begin with BOS."""
        opening = self._control_ids(self._neutral(("user",), generation_prompt=True))
        return opening[:1] == [self.bos_id] or self.adds_bos

    @cached_property
    def bos_opens_turns(self) -> bool:
        """True if the template writes BOS several times, as a mark of turns (Llama 2; SmolLM2's ``<|im_start|>``)."""
        return any(self._control_ids(text).count(self.bos_id) > 1 for text in self._neutrals())

    @cached_property
    def description(self) -> dict[str, Any]:
        """JSON document of everything that decides the rendering; lineages store it to report differences."""
        probes = [self._probe(roles) for roles in self._accepted]
        return {
            "kind": self.template.kind,
            "template": self.template.source,
            "special_tokens": dict(self.template.special_tokens),
            "date": self.template.today.isoformat() if self.template.uses_date else None,
            "end_tokens": self._end_tokens,
            "probe": digest(probes),
            # Left out by default, so that formats of adapters from before this setting keep their digests.
            **({"tools": self.template.tools} if self.template.tools != "own" else {}),
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the description: equal digests render every conversation to the same ids."""
        return digest(self.description)

    @cached_property
    def used_control_ids(self) -> frozenset[int]:
        """Control tokens in rendered conversations."""
        return frozenset(token for text in self._neutrals() for token in self._control_ids(text))

    def _neutral(self, roles: Sequence[Role], generation_prompt: bool = False) -> str:
        return self.template.render(of_roles(roles), generation_prompt=generation_prompt)

    def _probe(self, roles: Sequence[Role]) -> list[int] | None:
        """Return the ids of a conversation that probes the tokenizer's rules; None if the template refuses it."""
        messages = [Message(role, f" {role}\n\n1234 d'été  <s>[INST]<|eot_id|> 🙂 ") for role in roles]
        try:
            return list(self.prompt(messages) if roles[-1] == "user" else self.encode(messages).ids)
        except UserError:
            return None

    @cached_property
    def _accepted(self) -> list[tuple[Role, ...]]:
        """Probe conversations that the template accepts."""
        accepted: list[tuple[Role, ...]] = []
        for roles in PROBES:
            try:
                self._neutral(roles)
            except UserError:
                continue
            accepted.append(roles)
        return accepted

    def _neutrals(self) -> list[str]:
        return [self._neutral(roles) for roles in self._accepted]
