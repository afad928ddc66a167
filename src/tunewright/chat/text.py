"""From a template's text to token ids, keeping apart what the template wrote and what a message says."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tunewright.core.errors import UserError
from tunewright.data.examples import Message

# Piece of a rendered text: a control token's id, or the text between two of them.
Piece = int | str

_STAND_INS = range(0xF0000, 0xFFFFE)  # Private Use Area A: no assigned meaning, never white space


class TextEncoder:
    """Encodes rendered conversations with a tokenizer's own vocabulary and rules.

    Only control tokens that the template wrote become control ids. Text that looks like one is spelled out, as the
    makers' encoders do (Meta's ``ChatFormat``, ``mistral-common``); transformers' ``sanitize_control_tokens`` would
    also cut the text around it, which gives other ids.

    Args:
        tokenizer: a tokenizer of the ``tokenizers`` library.
        written: what the template writes around ordinary messages: tokens in it that the tokenizer lists as added are
            control tokens even if it doesn't call them special.

    Raises:
        UserError: the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: Any, written: str) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(
                f"a tokenizer of the kind {type(tokenizer).__name__} cannot be used",
                where=str(tokenizer.name_or_path),
                fix="Give the base with its tokenizer.json.",
            )
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        control = {text: token for text, token in added.items() if token.special or text in written}
        self.control: Mapping[str, int] = {text: tokenizer.convert_tokens_to_ids(text) for text in control}
        longest_first = sorted(control, key=len, reverse=True)
        self._look_alike = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._written = re.compile("|".join(_as_written(control[text]) for text in longest_first) or "(?!)")
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens([token for token in control.values() if not token.special])
        backend.encode_special_tokens = True
        # SentencePiece's space before a text's first word: here, every run but the first follows a control token.
        self.space_first = _without_space_first(backend)
        self._backend = backend
        self._unknown = tokenizer.unk_token_id  # what a tokenizer makes of characters that it has no token for

    def hide(self, messages: Sequence[Message]) -> tuple[list[Message], dict[int, str]]:
        """Messages in which one character stands for each text that looks like a control token, and what it stands for.

        Stand-ins survive whatever a template does to a text (trim, split, join), and cannot become control tokens.

        Raises:
            UserError: half of a surrogate pair, which no tokenizer takes.
        """
        for message in messages:
            if not message.content.isascii() and any("\ud800" <= c <= "\udfff" for c in message.content):
                raise UserError(f"half of a surrogate pair in the {message.role} turn: it stands for no character")
        found = {text for m in messages for text in self._look_alike.findall(m.content)}
        if not found:
            return list(messages), {}
        used = {character for m in messages for character in m.content}
        free = (code for code in _STAND_INS if chr(code) not in used)
        stand_ins = {text: next(free) for text in sorted(found)}
        hidden = [
            replace(m, content=self._look_alike.sub(lambda match: chr(stand_ins[match.group()]), m.content))
            for m in messages
        ]
        return hidden, {code: text for text, code in stand_ins.items()}

    def control_places(self, text: str) -> list[tuple[int, int, int]]:
        """Return the control tokens that the template wrote: each one's id, where it begins and where it ends."""
        return [(self.control[m.group().strip()], m.start(), m.end()) for m in self._written.finditer(text)]

    def pieces(self, text: str, hidden: Mapping[int, str], *, start: bool) -> list[Piece]:
        """Control ids and the runs of text between them, with hidden texts put back.

        Args:
            text: a part of a rendered conversation that doesn't begin or end inside a control token.
            hidden: what stand-ins stand for.
            start: whether this is the conversation's beginning.
        """
        pieces: list[Piece] = []
        place = 0
        for match in self._written.finditer(text):
            if place < match.start():
                pieces.append(text[place : match.start()])
            pieces.append(self.control[match.group().strip()])
            place = match.end()
        if place < len(text):
            pieces.append(text[place:])
        if start and self.space_first and pieces and isinstance(pieces[0], str) and not pieces[0].startswith(" "):
            pieces[0] = " " + pieces[0]
        return [piece.translate(hidden) if isinstance(piece, str) else piece for piece in pieces] if hidden else pieces

    def ids(self, runs: Iterable[str]) -> dict[str, list[int]]:
        """Return the ids of each distinct run of text.

        Raises:
            UserError: the vocabulary spells a control token, so that text could become one.
        """
        distinct = list(dict.fromkeys(runs))
        encoded = self._backend.encode_batch_fast(distinct, add_special_tokens=False)
        ids = {run: encoding.ids for run, encoding in zip(distinct, encoded, strict=True)}
        forbidden = set(self.control.values()) - {self._unknown}
        for run, found in ids.items():
            if not forbidden.isdisjoint(found):
                token = self._backend.id_to_token(next(i for i in found if i in forbidden))
                raise UserError(f"the tokenizer makes the control token {token} out of the plain text {run[:60]!r}")
        return ids


def _as_written(token: Any) -> str:
    """Return a pattern for the token in a template's text; some take the white space beside them along."""
    content = str(token.content)
    return (r"\s*" if token.lstrip else "") + re.escape(content) + (r"\s*" if token.rstrip else "")


def _without_space_first(backend: Any) -> bool:
    """Stop a SentencePiece tokenizer from putting a space before its first word; whether it did."""
    first = backend.pre_tokenizer
    if getattr(first, "prepend_scheme", None) != "first":
        return False
    first.prepend_scheme = "never"
    return True
