"""Encoding of rendered conversations, with control tokens from the template only, never from a message."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tunewright.core.errors import UserError
from tunewright.data.examples import Message

# A piece of rendered text: a control token's id, or the text between two of them.
Piece = int | str

_STAND_INS = range(0xF0000, 0xFFFFE)  # Private Use Area A: unassigned, and never white space


class TextEncoder:
    """Encoder of rendered conversations, with a tokenizer's own vocabulary and rules.

    Only control tokens from the template become control ids. Similar text in messages is encoded as ordinary text, as
    in the makers' encoders (Meta's ``ChatFormat``, ``mistral-common``). transformers' ``sanitize_control_tokens`` would
    also split the text around it, which gives other ids.

    Args:
        tokenizer: a tokenizer of the ``tokenizers`` library.
        written: the template's text around ordinary messages: the tokenizer's added tokens in it are control tokens
            even if they are not special.

    Raises:
        UserError: the tokenizer has another type.
    """

    def __init__(self, tokenizer: Any, written: str) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(
                f"Unsupported tokenizer type {type(tokenizer).__name__}",
                where=str(tokenizer.name_or_path),
                fix="Use a base with tokenizer.json.",
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
        # SentencePiece puts a space before a text's first word; here, all runs but the first follow a control token.
        self.space_first = _without_space_first(backend)
        self._backend = backend
        self._unknown = tokenizer.unk_token_id  # id of characters without a token

    def hide(self, messages: Sequence[Message]) -> tuple[list[Message], dict[int, str]]:
        """Replace texts that look like control tokens by one character each; return the messages and the replacements.

        The characters survive the template's operations (trim, split, join), and cannot become control tokens.

        Raises:
            UserError: half of a surrogate pair, which no tokenizer accepts.
        """
        for message in messages:
            if not message.content.isascii() and any("\ud800" <= c <= "\udfff" for c in message.content):
                raise UserError(f"Half of a surrogate pair in the {message.role} turn, which is not a character")
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
        """Return id, begin and end of each control token from the template."""
        return [(self.control[m.group().strip()], m.start(), m.end()) for m in self._written.finditer(text)]

    def pieces(self, text: str, hidden: Mapping[int, str], *, start: bool) -> list[Piece]:
        """Return control ids and the runs of text between them, with hidden texts restored.

        Args:
            text: a part of a rendered conversation that does not begin or end inside a control token.
            hidden: the replacements of ``hide``.
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
            UserError: plain text becomes a control token.
        """
        distinct = list(dict.fromkeys(runs))
        encoded = self._backend.encode_batch_fast(distinct, add_special_tokens=False)
        ids = {run: encoding.ids for run, encoding in zip(distinct, encoded, strict=True)}
        forbidden = set(self.control.values()) - {self._unknown}
        for run, found in ids.items():
            if not forbidden.isdisjoint(found):
                token = self._backend.id_to_token(next(i for i in found if i in forbidden))
                raise UserError(f"The tokenizer encodes the plain text {run[:60]!r} as the control token {token}")
        return ids


def _as_written(token: Any) -> str:
    """Return a pattern for the token in rendered text, with adjacent white space if the token strips it."""
    content = str(token.content)
    return (r"\s*" if token.lstrip else "") + re.escape(content) + (r"\s*" if token.rstrip else "")


def _without_space_first(backend: Any) -> bool:
    """Stop a SentencePiece tokenizer from putting a space before the first word; return whether it did so."""
    first = backend.pre_tokenizer
    if getattr(first, "prepend_scheme", None) != "first":
        return False
    first.prepend_scheme = "never"
    return True
