"""One way from a conversation to token ids, for training, evaluation and serving alike.

The base's own chat template decides, read from its tokenizer's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from tunewright.data.examples import Message
from tunewright.disk import digest
from tunewright.errors import UserError


@dataclass(frozen=True)
class Tokens:
    """A whole conversation as token ids, and for each whether it is trained."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    @property
    def prompt_length(self) -> int:
        """Tokens before the first trained one."""
        return self.loss_mask.index(True)


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """Ids of the conversation so far, up to where the assistant's answer begins.

    Raises:
        UserError: no chat template, or the template refuses this conversation.
    """
    return _render(tokenizer, messages, add_generation_prompt=True)


def encode(tokenizer: Any, messages: Sequence[Message], stop_ids: frozenset[int]) -> Tokens:
    """Ids of the whole conversation, the last assistant turn and its end token being trained.

    Raises:
        UserError: the template does not simply continue the prompt, or leaves the answer without an end token, or
            the answer spells an end token out.
    """
    prompt = prompt_ids(tokenizer, messages[:-1])
    whole = _render(tokenizer, messages, add_generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        raise UserError("the chat template changes the prompt once the answer is known, so that no mask fits")
    answer = whole[len(prompt) :]
    ends = [i for i, token in enumerate(answer) if token in stop_ids]
    if not ends:
        raise UserError("the chat template ends the answer with no end token: the model would never learn to stop")
    if len(ends) > 1:
        raise UserError("the answer contains the end-of-turn token as text; the model would learn to stop there")
    # What a template writes after the end of the turn (ChatML: a newline) is never generated, so not trained.
    answer = answer[: ends[0] + 1]
    return Tokens(prompt + answer, (False,) * len(prompt) + (True,) * len(answer))


def stop_ids(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's end of text and what the base's generation config adds to it."""
    more = generation_config.eos_token_id
    listed = more if isinstance(more, list) else [] if more is None else [more]
    return frozenset([tokenizer.eos_token_id, *listed])


def template_digest(tokenizer: Any) -> str:
    """SHA-256 of what decides the rendering: the chat template and the special tokens' texts.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    special = {name: str(text) for name, text in sorted(tokenizer.special_tokens_map.items())}
    return digest([_template(tokenizer), special])


def _template(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            where=str(tokenizer.name_or_path),
            fix="Use the instruction-tuned variant of this base.",
        )
    return str(tokenizer.chat_template)


def _render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> tuple[int, ...]:
    _template(tokenizer)
    try:
        ids = tokenizer.apply_chat_template(
            [m.as_dict() for m in messages],
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses this conversation: {error}") from error
    return tuple(ids)
