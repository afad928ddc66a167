"""Constrained decoding: at each step a row may only take a token after which its text can still match a grammar.

The grammar engine is llguidance (``docs/decisions/0013`` says why). It matches the bytes that tokens stand for, so an
allowed text is allowed in every tokenization: an answer that matches without the constraint stays the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer, regex_to_lark

from tunewright.config import ConstrainConfig
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.generation.grammar_process import compiled

_WHERE = "evaluate.structured_outputs"


@dataclass(frozen=True)
class Grammar:
    """The form of an allowed answer, as a rule in llguidance's Lark; equal rules allow equal answers."""

    rule: str

    @property
    def digest(self) -> str:
        """The SHA-256 of the rule, as evidence and releases state it."""
        return digest(self.rule)

    @classmethod
    def from_config(cls, config: ConstrainConfig, root: Path) -> Grammar:
        """Return the grammar of the config's constraint; a schema's file is relative to ``root``."""
        if config.choices is not None:
            return cls.choices(config.choices)
        if config.regex is not None:
            return cls.regex(config.regex)
        schema = config.json_schema
        assert schema is not None
        return cls.json_schema(read_schema(root / schema) if isinstance(schema, str) else schema)

    @classmethod
    def choices(cls, choices: Sequence[str]) -> Grammar:
        """Return the grammar of an answer that is one of these texts."""
        # Lark's string literals have JSON's syntax.
        return cls(" | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))

    @classmethod
    def regex(cls, regex: str) -> Grammar:
        """Return the grammar of an answer that matches this regular expression as a whole, in Rust's syntax."""
        return cls(f"/{regex_to_lark(regex, 'd')}/")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """Return the grammar of an answer that is JSON of this schema."""
        return cls(f"%json {json.dumps(schema)}")

    @classmethod
    def lark(cls, grammar: str) -> Grammar:
        """Return the grammar of an answer that the rule ``start`` of a grammar in llguidance's Lark matches."""
        return cls(f"%lark {{\n{grammar}\n}}")


def read_schema(path: Path) -> Any:
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("No such JSON schema", where=str(path), fix=f"Correct {_WHERE}.json_schema.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"Not valid JSON: {error}", where=str(path), fix=f"Correct {_WHERE}.json_schema.") from None
    if not isinstance(schema, dict):
        raise UserError(f"A JSON schema must be an object (got {type(schema).__name__})", where=str(path))
    return schema


class GrammarCompiler:
    """Compiles grammars for one base; safe to use in several threads.

    ``stop_ids`` end an answer and are allowed where the text so far matches (empty: the
    tokenizer's end token). ``affixes`` is optional text before and after the answer that its
    tokens may write (`answer_affixes`).
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int], affixes: tuple[str, str] = ("", "")) -> None:
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        end = sorted(stop_ids) or tokenizer.eos_token_id
        self.tokenizer_arguments: dict[str, Any] = {"tokenizer": backend.to_str(), "eos_token": end}
        self._tokenizer = LLTokenizer(**self.tokenizer_arguments)
        self.affixes = affixes

    def rules(self, grammar: Grammar) -> str:
        """Return the whole grammar of an answer with its affixes, in llguidance's Lark."""
        before, after = (f"{json.dumps(text)}?" if text else "" for text in self.affixes)
        return f"start: {before} answer {after}\nanswer: {grammar.rule}\n"

    def compile(self, grammar: Grammar) -> Constraint:
        """Return the grammar as a constraint. Other Python threads run meanwhile."""
        return Constraint(grammar, self._tokenizer, self.rules(grammar))

    @property
    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each token stands for; None for special tokens."""
        special = self._tokenizer.is_special_token
        return [None if special(token) else self.piece(token) for token in range(self.vocabulary)]

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        return self._tokenizer.vocab_size

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token represents; a special token's name, and empty for an id that is not a token."""
        return self._tokenizer.decode_bytes([token]) if token < self.vocabulary else b""


class Constraint:
    """A grammar compiled for a tokenizer; it can guide any number of rows. Made by :class:`GrammarCompiler`.

    Engines that compile grammars themselves take its ``rules`` (`GrammarCompiler.rules`).
    """

    def __init__(self, grammar: Grammar, tokenizer: LLTokenizer, rules: str) -> None:
        self.grammar = grammar
        self._tokenizer = tokenizer
        self.rules = rules
        self._fresh = compiled(tokenizer, rules)
        if self._fresh.is_error():
            raise UserError(f"Invalid constraint: {_reason(self._fresh.get_error())}", where=_WHERE)

    def start(self) -> Guide:
        """Return a guide for a row without tokens."""
        return Guide(self._fresh.deep_copy())

    def matches(self, text: str) -> bool:
        """Return whether this text is an allowed answer, ignoring outer white space."""
        return self.accepts(self._tokenizer.tokenize_str(text.strip()))

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Return whether these tokens, without an end token, are an allowed answer."""
        matcher = self._fresh.deep_copy()
        return matcher.try_consume_tokens(list(tokens)) == len(tokens) and matcher.is_accepting()


def _reason(error: str) -> str:
    """Return llguidance's error without its listing of the rules, and without places in it."""
    message = re.split(r"\n\s*1 \| |<non-verbose/>", error)[0]
    message = re.sub(r"\b(at )?\d+\(\d+\): ", "", message).removeprefix("failed to compile JSON schema: ")
    return " ".join(message.split())[:300]


class Guide:
    """One row's state in a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def advance(self, token: int) -> None:
        """Advance by a token that does not end the answer."""
        if not self._matcher.consume_token(token):
            raise UserError(f"The constraint failed while decoding: {_reason(self._matcher.get_error())}", where=_WHERE)

    @property
    def accepting(self) -> bool:
        """True if the text matches; more may follow."""
        return bool(self._matcher.is_accepting())

    @property
    def complete(self) -> bool:
        """True if the text matches and nothing can follow."""
        return self._matcher.is_stopped() and self.accepting

    def allowed(self) -> bytes:
        """Return a bitmask over the vocabulary, the lowest token in the lowest bit."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():  # the mask would end the answer
            raise UserError(f"The constraint failed while decoding: {_reason(self._matcher.get_error())}", where=_WHERE)
        return mask


def answer_affixes(tokenizer: Any, answer_ids: Sequence[int], text: str) -> tuple[str, str]:
    """Return the chat format's text before and after an answer: its own white space, usually empty.

    ``answer_ids`` are the answer ``text`` in the base's chat format, without its end token.
    """
    from llguidance.hf import from_tokenizer  # it imports transformers

    before, _, after = from_tokenizer(tokenizer).decode_str(list(answer_ids)).partition(text)
    return before, after
