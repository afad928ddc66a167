"""Conversations to token ids and loss mask, with the base's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunewright.chat.format import ChatFormat, Tokens
from tunewright.chat.loading import cached_format, chat_format, open_chat
from tunewright.config import ChatConfig, DataConfig
from tunewright.core.errors import UserError
from tunewright.data.examples import Message
from tunewright.data.readers.validate import RowError, example_from_object
from tunewright.models.bases import Base

__all__ = ["ChatFormat", "Tokens", "chat_format", "encode", "open_chat"]


def encode(tokenizer_or_base: Any, messages: Sequence[Message | Mapping[str, Any]]) -> Tokens:
    """Return the token ids of a conversation, and the loss mask: true for answers and their end tokens.

    The format of a tokenizer is cached until the tokenizer changes. For many conversations with a base, use
    ``open_chat(base)``, which has ``encode``, ``prompt`` and ``rows``.

    Args:
        tokenizer_or_base: a :class:`Base`, or a transformers tokenizer with a chat template.
        messages: turns, as :class:`Message` or dicts as in chat files; the last is the assistant's. Declarations of
            functions are a first message of role ``tools``.

    Raises:
        UserError: invalid turns, or an unusable template.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UserError("A conversation must be a list of turns", where="messages")
    turns = [m.as_dict() if isinstance(m, Message) else m for m in messages]
    row: dict[str, Any] = {"messages": turns}
    if (
        turns and isinstance(turns[0], Mapping) and turns[0].get("role") == "tools"
    ):  # an example's first message, which rows have under a key
        row = {"messages": turns[1:], "tools": turns[0].get("content")}
    try:
        example = example_from_object(row, DataConfig(max_characters=2**31))
    except RowError as error:
        raise UserError(f"Invalid conversation: {error}", where="messages") from error
    if isinstance(tokenizer_or_base, Base):
        return open_chat(tokenizer_or_base).encode(example.messages)
    eos = getattr(tokenizer_or_base, "eos_token_id", None)
    if eos is None:
        raise UserError(
            f"Expected a base or a tokenizer with eos_token_id (got {type(tokenizer_or_base).__name__})",
            where="tokenizer_or_base",
        )
    chat = cached_format(tokenizer_or_base, stop_ids=frozenset([eos]), kind="own", today=ChatConfig().date)
    return chat.encode(example.messages)
