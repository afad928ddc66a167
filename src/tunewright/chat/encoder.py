"""Encoding of rendered conversations, with control tokens from the template only, never from a message."""

from __future__ import annotations

import copy
import json
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
    also split the text around it, which gives other ids. ``written`` is the template's text around ordinary messages:
    the tokenizer's added tokens in it are control tokens even if they are not special.
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
        self.control_names: Mapping[int, str] = {number: text for text, number in self.control.items()}
        longest_first = sorted(control, key=len, reverse=True)
        self._look_alike = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._written = re.compile("|".join(_written_pattern(control[text]) for text in longest_first) or "(?!)")
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

        The characters survive the template's operations (trim, split, join, JSON), and cannot
        become control tokens. Calls and declarations are also covered.
        """
        texts = {
            text: message.role
            for message in messages
            for text in (
                message.content,
                message.reasoning,
                *(part for call in message.calls for part in (call.name, call.arguments)),
            )
        }
        for text, role in texts.items():
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise UserError(f"Half of a surrogate pair in the {role} turn, which is not a character")
        found = {match for text in texts for match in self._look_alike.findall(text)}
        if not found:
            return list(messages), {}
        used = {character for text in texts for character in text}
        free = (
            code for code in _STAND_INS if chr(code) not in used and not any(_escape(code) in text for text in texts)
        )
        stand_ins = {text: next(free) for text in sorted(found)}

        def hide(text: str) -> str:
            return self._look_alike.sub(lambda match: chr(stand_ins[match.group()]), text)

        hidden = [
            replace(
                m,
                content=hide(m.content),
                reasoning=hide(m.reasoning),
                calls=tuple(replace(call, name=hide(call.name), arguments=hide(call.arguments)) for call in m.calls),
            )
            for m in messages
        ]
        return hidden, {code: text for text, code in stand_ins.items()}

    def control_places(self, text: str) -> list[tuple[int, int, int]]:
        """Return id, begin and end of each control token from the template."""
        return [(self.control[m.group().strip()], m.start(), m.end()) for m in self._written.finditer(text)]

    def last_control(self, text: str) -> int | None:
        """Return the control token that ends the text, ignoring white space, if one does."""
        places = self.control_places(text)
        return places[-1][0] if places and not text[places[-1][2] :].strip() else None

    def pieces(self, text: str, hidden: Mapping[int, str], *, start: bool) -> list[Piece]:
        """Return control ids and the runs of text between them, with the texts restored that ``hide`` replaced.

        The text is a part of a rendered conversation (with ``start`` its beginning), whole control tokens only.
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
        return [_restore(piece, hidden) if isinstance(piece, str) else piece for piece in pieces] if hidden else pieces

    def ids(self, runs: Iterable[str]) -> dict[str, list[int]]:
        """Return the ids of each distinct run of text, none of which is a control token."""
        distinct = list(dict.fromkeys(runs))
        encoded = self._backend.encode_batch_fast(distinct, add_special_tokens=False)
        ids = {run: encoding.ids for run, encoding in zip(distinct, encoded, strict=True)}
        forbidden = set(self.control.values()) - {self._unknown}
        for run, found in ids.items():
            if not forbidden.isdisjoint(found):
                token = self._backend.id_to_token(next(i for i in found if i in forbidden))
                raise UserError(f"The tokenizer encodes the plain text {run[:60]!r} as the control token {token}")
        return ids


def _escape(code: int) -> str:
    """Return the character as ASCII JSON escapes it."""
    return json.dumps(chr(code))[1:-1]


def _restore(piece: str, hidden: Mapping[int, str]) -> str:
    """Restore hidden texts, which a template may have written as JSON in ASCII."""
    if "\\u" in piece:
        for code, text in hidden.items():
            piece = piece.replace(_escape(code), json.dumps(text)[1:-1])
    return piece.translate(hidden)


def _written_pattern(token: Any) -> str:
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
