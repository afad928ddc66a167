"""Constrained decoding: at each step a row may only take a token after which its text can still match a grammar.

The grammar engine is llguidance (``docs/decisions/0013`` says why). It takes tokens as the bytes that they stand for,
so that every way of cutting an allowed text into tokens is allowed: an answer that matches anyway stays as it is.
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
    """What an answer has to be, as a rule of llguidance's Lark; equal rules allow equal answers."""

    rule: str

    @classmethod
    def of(cls, config: ConstrainConfig, root: Path) -> Grammar:
        """Return the config's constraint; a schema's file is looked for in ``root``.

        Raises:
            UserError: the schema's file is not there, or is not JSON.
        """
        if config.choices is not None:
            # A text of Lark is written like one of JSON.
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
        raise UserError("no such JSON schema", where=str(path), fix=f"{_WHERE}.json_schema names it.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"not a JSON schema: {error}", where=str(path)) from None
    if not isinstance(schema, dict):
        raise UserError("a JSON schema is an object", where=str(path))
    return schema


class Constraint:
    """A grammar over a tokenizer, ready to guide any number of rows.

    Args:
        grammar: what answers have to be.
        tokenizer: a transformers tokenizer of the ``tokenizers`` library.
        stop_ids: tokens that end an answer: allowed where the text so far matches.
        around: what an answer's tokens may also write before and after its text: see :func:`around_answers`.

    Raises:
        UserError: the engine does not take the grammar.
    """

    def __init__(
        self, grammar: Grammar, tokenizer: Any, stop_ids: Collection[int], around: tuple[str, str] = ("", "")
    ) -> None:
        self.grammar = grammar
        self._tokenizer: LLTokenizer = from_tokenizer(tokenizer, eos_token=sorted(stop_ids))
        before, after = (f"{json.dumps(text)}?" if text else "" for text in around)
        rules = f"start: {before} answer {after}\nanswer: {grammar.rule}\n"
        self._fresh = LLMatcher(self._tokenizer, rules, log_level=0)
        if self._fresh.is_error():
            told = " ".join(self._fresh.get_error().split())
            raise UserError(f"the constraint cannot be used: {told[:300]}", where=_WHERE)

    def start(self) -> Guide:
        """Return a guide for a row that has no token yet."""
        return Guide(self._fresh.deep_copy())

    def matches(self, text: str) -> bool:
        """Return whether this text is an allowed answer, outer white space apart."""
        matcher = self._fresh.deep_copy()
        tokens = self._tokenizer.tokenize_str(text.strip())
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


class Guide:
    """One row's way through a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def take(self, token: int) -> None:
        """Go on with a token that was allowed, not one that ends the answer."""
        taken = self._matcher.consume_token(token)
        assert taken, self._matcher.get_error()

    @property
    def complete(self) -> bool:
        """True if the text matches and nothing can follow."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def allowed(self) -> bytes:
        """Return a bit for each token of the vocabulary, the lowest first.

        Raises:
            UserError: the grammar has become too complex for the engine.
        """
        if self._matcher.is_error():
            raise UserError(f"the constraint cannot go on: {self._matcher.get_error()[:300]}", where=_WHERE)
        return self._matcher.compute_bitmask()


def only_allowed(logits: Tensor, guides: Sequence[Guide | None]) -> Tensor:
    """Return the logits [rows, vocabulary], minus infinity where a row's guide forbids a token."""
    if all(guide is None for guide in guides):
        return logits
    # A bit for each token goes to the device, in one copy for all rows. Rows without a guide may take any token; a
    # model may have more logits than its tokenizer has tokens, and those no guide allows.
    vocabulary = logits.shape[1]
    bits = np.full((len(guides), -(-vocabulary // 8)), 255, dtype=np.uint8)
    for row, guide in enumerate(guides):
        if guide is not None:
            own = np.frombuffer(guide.allowed(), dtype=np.uint8)[: bits.shape[1]]
            bits[row] = 0
            bits[row, : len(own)] = own
    packed = torch.from_numpy(bits).to(logits.device, non_blocking=True)
    places = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (packed[:, :, None] >> places & 1).flatten(1)[:, :vocabulary]  # [rows, vocabulary]
    return logits.masked_fill(allowed == 0, -torch.inf)


def around_answers(tokenizer: Any, answer_ids: Sequence[int], text: str) -> tuple[str, str]:
    """Return what a chat format writes before and after an answer's text: white space of its own, mostly none.

    Args:
        tokenizer: as of :class:`Constraint`.
        answer_ids: an answer as the base's chat format writes it, without what ends it.
        text: that answer.
    """
    before, _, after = from_tokenizer(tokenizer).decode_str(list(answer_ids)).partition(text)
    return before, after
