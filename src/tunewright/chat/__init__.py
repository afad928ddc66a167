"""Conversations to token ids and loss mask, with the base's chat template."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import Any
from weakref import WeakKeyDictionary

from tunewright.chat.encoder import TextEncoder
from tunewright.chat.format import ChatFormat
from tunewright.chat.rendering import Tokens
from tunewright.chat.templates import PLAIN_INSTEAD, Template, TemplateKind, ToolsKind
from tunewright.chat.tool_form import rendered_calls
from tunewright.config import ChatConfig, DataConfig, ReasoningMode
from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.core.progress import LogReporter, Reporter
from tunewright.data.examples import Message
from tunewright.data.readers.row_errors import RowError
from tunewright.data.readers.validate import example_from_object
from tunewright.models.bases import Base, untrained_tokens
from tunewright.models.loading import TEKKEN, end_token_ids, load_tokenizer

__all__ = ["ChatFormat", "Tokens", "chat_format", "encode", "open_chat"]


def encode(tokenizer_or_base: Any, messages: Sequence[Message | Mapping[str, Any]]) -> Tokens:
    """Return the token ids of a conversation, and the loss mask: true for answers and their end tokens.

    The format of a tokenizer is cached until the tokenizer changes. For many conversations with a
    base, use ``open_chat(base)``, which has ``encode``, ``prompt`` and ``rows``.

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
    ):  # examples have it as first message, rows under a key
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


def chat_format(
    tokenizer: Any,
    *,
    stop_ids: frozenset[int],
    kind: TemplateKind,
    today: date,
    tools: ToolsKind = "own",
    reasoning: ReasoningMode = "train",
) -> ChatFormat:
    """Return the chat format of a tokenizer; a UserError says why its template or its rules cannot be used."""
    template = Template.of(tokenizer, kind, today, tools)
    neutral = template.render([Message("user", "x")], generation_prompt=True)
    with_calls = list(rendered_calls(template))
    thinking = [Message("user", "x"), Message("assistant", "x", reasoning="x")] if template.thinking else []
    with_thinking = template.render(thinking, generation_prompt=False) if thinking else ""
    encoder = TextEncoder(tokenizer, "".join([neutral, *with_calls, with_thinking]))
    ends = {end for text in with_calls if (end := encoder.last_control(text)) is not None}
    chat = ChatFormat(tokenizer, template, stop_ids | ends, encoder, reasoning)
    _check_rules(chat)
    return chat


def _check_rules(chat: ChatFormat) -> None:
    """Compare the encoder with the tokenizer's own call on a text without control tokens in messages; try an answer."""
    text = chat.template.render([Message("user", "What's  new,\n\nZoë?")], generation_prompt=True)
    (tokens,) = chat.tokens([chat._rendered_row(text, [], [], {})])
    own: list[int] = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    ours = list(tokens.ids)
    if ours not in (own, [chat.bos_id, *own]):
        raise UserError("The tokenizer's rules are not supported", where=chat.template.name, fix="Use another base.")
    if ours[:2] == [chat.bos_id] * 2:
        raise UserError(
            "The chat template writes the beginning-of-text token twice", where=chat.template.name, fix=PLAIN_INSTEAD
        )
    chat.encode([Message("user", "x"), Message("assistant", "x")])


def open_chat(base: Base, settings: ChatConfig | None = None, reporter: Reporter | None = None) -> ChatFormat:
    """Return the chat format of a base.

    Raises:
        UserError: no usable template, or one with tokens whose embeddings were never trained.
    """
    settings = settings or ChatConfig()
    tokenizer = load_tokenizer(base)
    if not tokenizer.chat_template and (base.folder / TEKKEN).exists() and settings.template != "plain":
        tokenizer.chat_template = _mistral_common_template(base, settings)
    kind: TemplateKind = "own" if settings.template == "own" else "plain"
    if settings.template == "auto":
        kind = "own" if tokenizer.chat_template else "plain"
        if kind == "plain":
            (reporter or LogReporter()).say(
                f"{base.spec} has no chat template: using the plain form (### Instruction, ### Response). An "
                "instruction-tuned variant has a template."
            )
    ends = end_token_ids(base)
    if unknown := sorted(token for token in ends if tokenizer.convert_ids_to_tokens(token) is None):
        raise UserError(
            f"eos_token_id has ids without a token in the tokenizer: {', '.join(map(str, unknown))}",
            where=str(base.folder / "generation_config.json"),
        )
    stop_ids = ends | {tokenizer.eos_token_id}
    chat = chat_format(
        tokenizer,
        stop_ids=stop_ids,
        kind=kind,
        today=settings.date,
        tools=settings.tools,
        reasoning=settings.reasoning,
    )
    refuse_untrained(chat, base, chat.used_control_ids)
    return chat


def _mistral_common_template(base: Base, settings: ChatConfig) -> str:
    """Return the chat template that mistral-common generates for the base's tekken.json."""
    if settings.template == "auto":
        raise UserError(
            f"{TEKKEN} without a chat template: it is unknown whether the model is instruction-tuned",
            where=str(base.folder),
            fix="Set chat.template to own for an instruction-tuned model (mistral-common generates the template), or "
            "to plain for a base model.",
        )
    try:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
    except ImportError:
        raise UserError(
            f"{TEKKEN} has no chat template, and mistral-common, which generates one, is not installed",
            where=str(base.folder),
            fix=f"{install_command(packages=['mistral-common>=1.13'])}, or add the model's chat_template.jinja to the "
            "folder.",
        ) from None
    try:
        return convert_tokenizer_to_chat_template(base.folder / TEKKEN)
    except (MistralCommonException, ValueError) as error:
        raise UserError(
            f"mistral-common cannot generate a chat template: {error}", where=str(base.folder / TEKKEN)
        ) from error


def refuse_untrained(chat: ChatFormat, base: Base, ids: frozenset[int]) -> None:
    """Refuse tokens whose embedding the base never trained, by name."""
    untrained = untrained_tokens(base, ids)
    if untrained:
        names = ", ".join(map(str, chat.tokenizer.convert_ids_to_tokens(untrained)))
        own = chat.template.kind == "own"
        raise UserError(
            f"Untrained embedding of the token{'s' if len(untrained) > 1 else ''} {names}, which LoRA does not train",
            where=base.spec,
            fix="Use the instruction-tuned variant of this base, or set chat.template to plain."
            if own
            else "Remove these texts from the pairs, or use another base.",
        )


_PROBE = " Tokens\n\n1234 d'été İstanbul  <s>[INST]<|eot_id|> 🙂 naïve 東京 "


# A format and the state it was made from, without its tokenizer, which the format would keep alive.
_cached: WeakKeyDictionary[Any, tuple[tuple[Any, ...], ChatFormat]] = WeakKeyDictionary()


def cached_format(tokenizer: Any, *, stop_ids: frozenset[int], kind: TemplateKind, today: date) -> ChatFormat:
    """Return the format of :func:`chat_format`, cached until the tokenizer or an argument changes."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return chat_format(tokenizer, stop_ids=stop_ids, kind=kind, today=today)
    state = (stop_ids, kind, today, *_tokenizer_state(tokenizer))
    kept = _cached.get(tokenizer)
    if kept is None or kept[0] != state:
        chat = chat_format(tokenizer, stop_ids=stop_ids, kind=kind, today=today)
        kept = _cached[tokenizer] = state, replace(chat, tokenizer=None)
    return replace(kept[1], tokenizer=tokenizer)


def _tokenizer_state(tokenizer: Any) -> tuple[Any, ...]:
    """Return the mutable state of a tokenizer that decides its format, except the vocabulary, which is too large.

    A replaced vocabulary shows in its size or in the ids of a probe text.
    """
    backend = tokenizer.backend_tokenizer
    model = backend.model
    return (
        str(tokenizer.name_or_path),
        pickle.dumps(tokenizer.chat_template),
        {name: str(text) for name, text in tokenizer.special_tokens_map.items()},
        {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()},
        id(backend),
        pickle.dumps((backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)),
        type(model),
        backend.get_vocab_size(),
        tuple(backend.encode(_PROBE).ids),
    )
