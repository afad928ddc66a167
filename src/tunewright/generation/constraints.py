"""Constrained decoding: at each step a row may only take a token after which its text can still match a grammar.

The grammar engine is llguidance (``docs/decisions/0013`` says why). It matches the bytes that tokens stand for, so an
allowed text is allowed in every tokenization: an answer that matches without the constraint stays the same.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, regex_to_lark
from llguidance.hf import from_tokenizer
from torch import Tensor

from tunewright.config import ConstrainConfig
from tunewright.core.errors import UserError

_WHERE = "evaluate.structured_outputs"


@dataclass(frozen=True)
class Grammar:
    """The form of an allowed answer, as a rule in llguidance's Lark; equal rules allow equal answers."""

    rule: str

    @classmethod
    def from_config(cls, config: ConstrainConfig, root: Path) -> Grammar:
        """Return the grammar of the config's constraint; a schema's file is relative to ``root``.

        Raises:
            UserError: the schema's file does not exist, or is not JSON.
        """
        if config.choices is not None:
            # Lark's string literals have JSON's syntax.
            return cls(" | ".join(json.dumps(choice, ensure_ascii=False) for choice in config.choices))
        if config.regex is not None:
            return cls(f"/{regex_to_lark(config.regex, 'd')}/")
        schema = config.json_schema
        assert schema is not None
        return cls(f"%json {json.dumps(_read_schema(root / schema) if isinstance(schema, str) else schema)}")


def _read_schema(path: Path) -> Any:
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("No such JSON schema", where=str(path), fix=f"Correct {_WHERE}.json_schema.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"Not valid JSON: {error}", where=str(path), fix=f"Correct {_WHERE}.json_schema.") from None
    if not isinstance(schema, dict):
        raise UserError(f"A JSON schema must be an object (got {type(schema).__name__})", where=str(path))
    return schema


class Constraint:
    """A grammar compiled for a tokenizer; it can guide any number of rows.

    Args:
        grammar: the form of allowed answers.
        tokenizer: a transformers tokenizer of the ``tokenizers`` library.
        stop_ids: tokens that end an answer: allowed where the text so far matches.
        affixes: optional text before and after the answer that its tokens may write: see :func:`answer_affixes`.

    Raises:
        UserError: the engine rejects the grammar.
    """

    def __init__(
        self, grammar: Grammar, tokenizer: Any, stop_ids: Collection[int], affixes: tuple[str, str] = ("", "")
    ) -> None:
        self.grammar = grammar
        self._tokenizer: LLTokenizer = from_tokenizer(tokenizer, eos_token=sorted(stop_ids))
        before, after = (f"{json.dumps(text)}?" if text else "" for text in affixes)
        rules = f"start: {before} answer {after}\nanswer: {grammar.rule}\n"
        self._fresh = LLMatcher(self._tokenizer, rules, log_level=0)
        if self._fresh.is_error():
            reason = " ".join(self._fresh.get_error().split())
            raise UserError(f"Invalid constraint: {reason[:300]}", where=_WHERE)

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


class Guide:
    """One row's state in a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def advance(self, token: int) -> None:
        """Advance by an allowed token that does not end the answer."""
        taken = self._matcher.consume_token(token)
        assert taken, self._matcher.get_error()

    @property
    def complete(self) -> bool:
        """True if the text matches and nothing can follow."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def allowed(self) -> bytes:
        """Return a bitmask over the vocabulary, the lowest token in the lowest bit.

        Raises:
            UserError: the grammar has become too complex for the engine.
        """
        if self._matcher.is_error():
            raise UserError(f"The constraint failed while decoding: {self._matcher.get_error()[:300]}", where=_WHERE)
        return self._matcher.compute_bitmask()


def mask_logits(logits: Tensor, masks: Sequence[bytes | None]) -> Tensor:
    """Return the logits [rows, vocabulary] with minus infinity where a row's mask forbids a token.

    Args:
        logits: [rows, vocabulary].
        masks: a bitmask of :meth:`Guide.allowed` for each row; None allows every token.
    """
    if all(mask is None for mask in masks):
        return logits
    # One bit for each token goes to the device, in one copy for all rows. Rows without a mask may take any token. A
    # model may have more logits than its tokenizer has tokens; no mask allows the extra ones.
    vocabulary = logits.shape[1]
    bits = np.full((len(masks), -(-vocabulary // 8)), 255, dtype=np.uint8)  # [rows, vocabulary / 8]
    for row, mask in enumerate(masks):
        if mask is not None:
            own = np.frombuffer(mask, dtype=np.uint8)[: bits.shape[1]]
            bits[row] = 0
            bits[row, : len(own)] = own
    packed = torch.from_numpy(bits).to(logits.device, non_blocking=True)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (packed[:, :, None] >> shifts & 1).flatten(1)[:, :vocabulary]  # [rows, vocabulary]
    return logits.masked_fill(allowed == 0, -torch.inf)


def answer_affixes(tokenizer: Any, answer_ids: Sequence[int], text: str) -> tuple[str, str]:
    """Return the chat format's text before and after an answer: its own white space, usually empty.

    Args:
        tokenizer: as for :class:`Constraint`.
        answer_ids: an answer in the base's chat format, without its end token.
        text: that answer.
    """
    before, _, after = from_tokenizer(tokenizer).decode_str(list(answer_ids)).partition(text)
    return before, after
