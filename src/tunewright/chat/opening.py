"""The chat format of a base: its template, or the plain form, made only of tokens that the base knows."""

from __future__ import annotations

from typing import Any

from tunewright.chat.format import ChatFormat, chat_format
from tunewright.chat.templates import TemplateKind
from tunewright.config import ChatConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter, Reporter
from tunewright.models.bases import Base
from tunewright.models.embeddings import untrained_tokens
from tunewright.models.loading import TEKKEN, end_token_ids, load_tokenizer


def open_chat(base: Base, settings: ChatConfig | None = None, reporter: Reporter | None = None) -> ChatFormat:
    """Return the format that conversations with this base have.

    Raises:
        UserError: no usable template, or one that writes tokens whose embeddings were never trained.
    """
    settings = settings or ChatConfig()
    tokenizer = load_tokenizer(base)
    if not tokenizer.chat_template and (base.folder / TEKKEN).exists() and settings.template != "plain":
        tokenizer.chat_template = _mistrals_template(base, settings)
    kind: TemplateKind = "own" if settings.template == "own" else "plain"
    if settings.template == "auto":
        kind = "own" if tokenizer.chat_template else "plain"
        if kind == "plain":
            (reporter or LogReporter()).say(
                f"{base.spec} has no chat template: conversations are written in the plain form (### Instruction, "
                "### Response). An instruction-tuned variant would know its own."
            )
    chat = chat_format(
        tokenizer, stop_ids=_stop_ids(tokenizer, base, end_token_ids(base)), kind=kind, today=settings.date
    )
    refuse_untrained(chat, base, chat.used_control_ids)
    return chat


def _mistrals_template(base: Base, settings: ChatConfig) -> str:
    """Return the chat template that mistral-common writes for the base's tekken.json.

    Raises:
        UserError: `chat.template` is auto, since the file does not say whether the model is instruction-tuned; or
            mistral-common is missing.
    """
    if settings.template == "auto":
        raise UserError(
            f"{TEKKEN} and no chat template: this may be a base model, or an instruction-tuned one",
            where=str(base.folder),
            fix="Set chat.template to own for an instruction-tuned model (mistral-common writes its template), or to "
            "plain for a base model.",
        )
    try:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
    except ImportError:
        raise UserError(
            f"{TEKKEN} comes without a chat template, and mistral-common, which writes one, is not installed",
            where=str(base.folder),
            fix="pip install 'mistral-common>=1.13', or add the model's chat_template.jinja to the folder.",
        ) from None
    try:
        return convert_tokenizer_to_chat_template(base.folder / TEKKEN)
    except (MistralCommonException, ValueError) as error:
        raise UserError(f"mistral-common writes no chat template: {error}", where=str(base.folder / TEKKEN)) from error


def refuse_untrained(chat: ChatFormat, base: Base, ids: frozenset[int]) -> None:
    """Refuse tokens that mean nothing to the base.

    Raises:
        UserError: naming each token whose embedding was never trained.
    """
    untrained = untrained_tokens(base, ids)
    if untrained:
        names = ", ".join(map(str, chat.tokenizer.convert_ids_to_tokens(untrained)))
        own = chat.template.kind == "own"
        raise UserError(
            f"the base never learnt the token{'s' if len(untrained) > 1 else ''} {names}: the embedding is empty, and "
            "LoRA does not train it",
            where=base.spec,
            fix="Use the instruction-tuned variant of this base, or set chat.template to plain."
            if own
            else "Take these texts out of the pairs, or use another base.",
        )


def _stop_ids(tokenizer: Any, base: Base, ends: frozenset[int]) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's end of text and what the base's generation settings add to it."""
    unknown = sorted(token for token in ends if tokenizer.convert_ids_to_tokens(token) is None)
    if unknown:
        raise UserError(
            f"eos_token_id names {', '.join(map(str, unknown))}, which the tokenizer has no token for",
            where=str(base.folder / "generation_config.json"),
        )
    return ends | {tokenizer.eos_token_id}
