"""Ends of answers: the token limit and the stop strings of evaluation, training and serving."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tunewright.chat.format import ChatFormat
from tunewright.chat.tool_calls import declared_functions
from tunewright.config import Config
from tunewright.core.progress import Reporter
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member

if TYPE_CHECKING:
    from tunewright.generation.constraints import GrammarCompiler
    from tunewright.generation.requests import Completion

PLAIN_STOPS = tuple(f"{line}### {heading}" for heading in ("Instruction", "Response") for line in ("\n\n", "\n"))
"""Headings of the plain form: a base that does not end its answer continues with the next turn."""


def stop_strings(config: Config, chat: ChatFormat) -> tuple[str, ...]:
    """Return the stop strings: the config's, else the headings of the plain form.

    A base's own chat template ends turns with a token, so it needs no stop strings.
    """
    if config.evaluate.stop is not None:
        return config.evaluate.stop
    return PLAIN_STOPS if chat.template.kind == "plain" else ()


def answer_text(chat: ChatFormat, completion: Completion, conversation: Sequence[Message] = ()) -> str:
    """Return the text of a completion, up to the stop string that ended it.

    If the answered conversation declares functions, calls are read and have their canonical text
    (``Message.text``), which references also have. Thinking is left out.
    """
    if declared_functions(conversation) or chat.thinking is not None:
        return answer_message(chat, completion, conversation).text
    return chat.text(completion.ids) if completion.before_stop is None else completion.before_stop


def answer_message(chat: ChatFormat, completion: Completion, conversation: Sequence[Message]) -> Message:
    """Return a completion as the assistant's turn, up to the stop string that ended it.

    Calls are read if the answered conversation declares functions.
    """
    ids, rest = completion.ids, ""
    if completion.before_stop is not None:
        # The stop string may begin inside a token.
        while not completion.before_stop.startswith(chat.text(ids)):
            ids = ids[:-1]
        rest = completion.before_stop[len(chat.text(ids)) :]
    return chat.answer(ids, conversation, rest)


def grammar_compiler(chat: ChatFormat) -> GrammarCompiler:
    """Return the compiler of grammars for this format's answers."""
    from tunewright.generation.constraints import GrammarCompiler, answer_affixes

    text = "x"
    tokens = chat.encode([Message("user", text), Message("assistant", text)])
    answer = [token for token in tokens.ids[-answer_length(tokens.loss_mask) :] if token not in chat.stop_ids]
    return GrammarCompiler(chat.tokenizer, chat.stop_ids, answer_affixes(chat.tokenizer, answer, text))


def constraint_end(chat: ChatFormat) -> int:
    """Return the token that ends a constrained answer in engines that take only one: the tokenizer's end token."""
    end: int = chat.tokenizer.eos_token_id
    return end if end in chat.stop_ids else min(chat.stop_ids)


def answer_limit(config: Config, chat: ChatFormat, members: Iterable[Member]) -> int:
    """Return the token limit of answers: the config's, else the 99th percentile of these members with a margin.

    The margin is a quarter, at least 8 tokens. The longest answer may be an outlier, and each
    answer that does not end costs the whole limit.
    """
    if config.evaluate.max_new_tokens is not None:
        return config.evaluate.max_new_tokens
    lengths = answer_lengths(chat, [m.example for m in members])
    usual = int(np.percentile(lengths, 99, method="inverted_cdf"))  # 99 of 100 answers fit into that many tokens
    return usual + max(8, math.ceil(usual / 4))


def answer_lengths(chat: ChatFormat, examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of each example's last answer, including its thinking and the end token."""
    if chat.reasoning == "mask":
        chat = replace(chat, reasoning="train")
    last_turns = [chat.rendered_rows(example.messages)[-1] for example in examples]
    return [answer_length(row.loss_mask) for row in chat.tokens(last_turns)]


def warn_of_longer_references(
    chat: ChatFormat, examples: Sequence[Example], limit: int, split: str, reporter: Reporter
) -> None:
    """Warn of references longer than ``limit`` tokens, with the limit that would fit all."""
    lengths = answer_lengths(chat, examples)
    if longer := sum(length > limit for length in lengths):
        reporter.warn(
            f"evaluate.max_new_tokens: {longer:,} of {len(lengths):,} {split} references are longer than the limit of "
            f"{limit:,} tokens, so right answers would be cut off. {max(lengths):,} tokens fit all of {split}."
        )


def answer_length(loss_mask: Sequence[bool]) -> int:
    """Return the number of tokens of the last trained turn, which ends the row."""
    return next((n for n, trained in enumerate(reversed(loss_mask)) if not trained), len(loss_mask))
