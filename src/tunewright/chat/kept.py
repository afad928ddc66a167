"""Chat formats that are kept as long as their tokenizers: making one copies the vocabulary, which takes a second."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from datetime import date
from typing import Any
from weakref import WeakKeyDictionary

from tunewright.chat.format import ChatFormat, chat_format
from tunewright.chat.templates import TemplateKind

_PROBE = " Tokens\n\n1234 d'été İstanbul  <s>[INST]<|eot_id|> 🙂 naïve 東京 "


@dataclass(frozen=True)
class _Kept:
    """A format without its tokenizer, which would otherwise be kept alive by it, and what it was made from."""

    state: tuple[Any, ...]
    chat: ChatFormat


_kept: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()


def kept_format(tokenizer: Any, *, stop_ids: frozenset[int], kind: TemplateKind, today: date) -> ChatFormat:
    """Return the format of :func:`chat_format`, made again only when the tokenizer or an argument has changed.

    Raises:
        UserError: as :func:`chat_format`.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return chat_format(tokenizer, stop_ids=stop_ids, kind=kind, today=today)
    state = (stop_ids, kind, today, *_state(tokenizer))
    kept = _kept.get(tokenizer)
    if kept is None or kept.state != state:
        chat = chat_format(tokenizer, stop_ids=stop_ids, kind=kind, today=today)
        kept = _kept[tokenizer] = _Kept(state, replace(chat, tokenizer=None))
    return replace(kept.chat, tokenizer=tokenizer)


def _state(tokenizer: Any) -> tuple[Any, ...]:
    """Everything of a tokenizer that decides its format and can be changed. Only the vocabulary is too large to copy.

    A vocabulary that was exchanged in place shows in its size or in the ids of a text.
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
