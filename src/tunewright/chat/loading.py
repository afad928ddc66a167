"""The chat format of a base, and cached formats of tokenizers."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from datetime import date
from typing import Any
from weakref import WeakKeyDictionary

from tunewright.chat.format import ChatFormat
from tunewright.chat.templates import PLAIN_INSTEAD, Template, TemplateKind, ToolsKind
from tunewright.chat.text import TextEncoder
from tunewright.chat.tool_form import rendered_calls
from tunewright.config import ChatConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter, Reporter
from tunewright.data.examples import Message
from tunewright.models.bases import Base, untrained_tokens
from tunewright.models.loading import TEKKEN, end_token_ids, load_tokenizer


def chat_format(
    tokenizer: Any, *, stop_ids: frozenset[int], kind: TemplateKind, today: date, tools: ToolsKind = "own"
) -> ChatFormat:
    """Return the chat format of a tokenizer.

    Raises:
        UserError: the tokenizer lacks its own template (``kind``), the template cannot be used, or the
            tokenizer's rules are not supported.
    """
    template = Template.of(tokenizer, kind, today, tools)
    neutral = template.render([Message("user", "x")], generation_prompt=True)
    with_calls = list(rendered_calls(template))
    encoder = TextEncoder(tokenizer, "".join([neutral, *with_calls]))
    ends = {end for text in with_calls if (end := encoder.last_control(text)) is not None}
    chat = ChatFormat(tokenizer, template, stop_ids | ends, encoder)
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
    chat = chat_format(
        tokenizer,
        stop_ids=_stop_ids(tokenizer, base, end_token_ids(base)),
        kind=kind,
        today=settings.date,
        tools=settings.tools,
    )
    refuse_untrained(chat, base, chat.used_control_ids)
    return chat


def _mistral_common_template(base: Base, settings: ChatConfig) -> str:
    """Return the chat template that mistral-common generates for the base's tekken.json.

    Raises:
        UserError: `chat.template` is auto (the file does not show whether the model is instruction-tuned), or
            mistral-common is missing.
    """
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
            fix="pip install 'mistral-common>=1.13', or add the model's chat_template.jinja to the folder.",
        ) from None
    try:
        return convert_tokenizer_to_chat_template(base.folder / TEKKEN)
    except (MistralCommonException, ValueError) as error:
        raise UserError(
            f"mistral-common cannot generate a chat template: {error}", where=str(base.folder / TEKKEN)
        ) from error


def refuse_untrained(chat: ChatFormat, base: Base, ids: frozenset[int]) -> None:
    """Refuse tokens that the base was not trained on.

    Raises:
        UserError: the embedding of a token was never trained; names each.
    """
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


def _stop_ids(tokenizer: Any, base: Base, ends: frozenset[int]) -> frozenset[int]:
    """Return the ids that end an answer: the tokenizer's EOS, and those in the base's generation config."""
    unknown = sorted(token for token in ends if tokenizer.convert_ids_to_tokens(token) is None)
    if unknown:
        raise UserError(
            f"eos_token_id has ids without a token in the tokenizer: {', '.join(map(str, unknown))}",
            where=str(base.folder / "generation_config.json"),
        )
    return ends | {tokenizer.eos_token_id}


_PROBE = " Tokens\n\n1234 d'été İstanbul  <s>[INST]<|eot_id|> 🙂 naïve 東京 "


@dataclass(frozen=True)
class _CachedFormat:
    """A format and the state it was made from, without its tokenizer, which the format would keep alive."""

    state: tuple[Any, ...]
    chat: ChatFormat


_cached: WeakKeyDictionary[Any, _CachedFormat] = WeakKeyDictionary()


def cached_format(tokenizer: Any, *, stop_ids: frozenset[int], kind: TemplateKind, today: date) -> ChatFormat:
    """Return the format of :func:`chat_format`, cached until the tokenizer or an argument changes.

    Raises:
        UserError: as :func:`chat_format`.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return chat_format(tokenizer, stop_ids=stop_ids, kind=kind, today=today)
    state = (stop_ids, kind, today, *_tokenizer_state(tokenizer))
    kept = _cached.get(tokenizer)
    if kept is None or kept.state != state:
        chat = chat_format(tokenizer, stop_ids=stop_ids, kind=kind, today=today)
        kept = _cached[tokenizer] = _CachedFormat(state, replace(chat, tokenizer=None))
    return replace(kept.chat, tokenizer=tokenizer)


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
