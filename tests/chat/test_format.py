"""Rendered ids and trained tokens, for any template; formats kept with their tokenizers while nothing changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from making.tiny_bases import CHATML, byte_tokenizer, chat_of
from tunewright.chat import ChatFormat, Tokens, cached_format, chat_format, encode
from tunewright.chat.inspection import differences
from tunewright.config import ChatConfig
from tunewright.core.errors import UserError
from tunewright.data.examples import Message

TOKENIZER = byte_tokenizer()
CHAT = chat_of(TOKENIZER)

TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
DATED_BY_NAME = "{{ '<|im_start|>system\nToday is ' + date_string + '<|im_end|>\n' }}" + CHATML
DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
# As Mistral's v2 and v3: the system text stands in the last user turn, wherever that is.
MOVING_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ system if m is sameas last }}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As reasoning models: what earlier answers say up to a mark is left out of later prompts.
FORGETTING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('=')[-1] }}{% else %}{{ m['content'] }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _with_template(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def _chat(template: str) -> ChatFormat:
    return chat_of(_with_template(template))


def _turns(*texts: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant") * len(texts)
    turns = [Message(role, text) for role, text in zip(roles, texts, strict=False)]  # type: ignore[arg-type]
    return turns if system is None else [Message("system", system), *turns]


def _trained(row: Tokens) -> list[str]:
    """The text of each trained run."""
    runs: list[list[int]] = [[]]
    for token, trained in zip(row.ids, row.loss_mask, strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [TOKENIZER.decode(run) for run in runs if run]


def test_encode_trains_every_answer_with_its_end_token_only() -> None:
    tokens = CHAT.encode(_turns("Ohio", "Oh.", "Iowa", "Ia.", system="Cite."))
    assert _trained(tokens) == ["Oh.<|im_end|>", "Ia.<|im_end|>"]
    assert TOKENIZER.decode(tokens.ids) == (
        "<|im_start|>system\nCite.<|im_end|>\n<|im_start|>user\nOhio<|im_end|>\n<|im_start|>assistant\nOh.<|im_end|>\n"
        "<|im_start|>user\nIowa<|im_end|>\n<|im_start|>assistant\nIa.<|im_end|>"
    )


def test_encode_masks_turns_of_weight_0() -> None:
    turns = _turns("a", "b", "c", "d")
    turns[1] = Message("assistant", "b", weight=0)
    (row,) = CHAT.rows(turns)
    assert _trained(row) == ["d<|im_end|>"]
    assert row.ids == CHAT.encode(_turns("a", "b", "c", "d")).ids


texts = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=20)
dialogues = st.integers(1, 4).flatmap(lambda n: st.lists(texts, min_size=2 * n, max_size=2 * n))
templates = st.sampled_from([CHATML, TRIMMING, DEFAULT_SYSTEM, DATED, MOVING_SYSTEM, FORGETTING])


@given(templates, dialogues, st.none() | texts)
def test_rows_train_each_answer_once_after_its_serving_prompt(
    template: str, turns: list[str], system: str | None
) -> None:
    chat = _CHATS.setdefault(template, _chat(template))
    messages = _turns(*turns, system=system)
    rows = chat.rows(messages)
    seen = []
    for row in rows:
        for start in _starts(row):
            place = next(
                i
                for i, m in enumerate(messages)
                if m.role == "assistant" and i not in seen and chat.prompt(messages[:i]) == row.ids[:start]
            )
            seen.append(place)
            answer = messages[place].content
            run = row.ids[start : row.ids.index(TOKENIZER.eos_token_id, start)]
            assert TOKENIZER.decode(run) == (answer.strip() if template is TRIMMING else answer)
    assert seen == [i for i, m in enumerate(messages) if m.role == "assistant"]


_CHATS: dict[str, ChatFormat] = {}


def _starts(row: Tokens) -> list[int]:
    return [i for i, trained in enumerate(row.loss_mask) if trained and not row.loss_mask[i - 1]]


def test_rows_are_split_when_a_template_rewrites_earlier_turns() -> None:
    chat = _chat(MOVING_SYSTEM)
    rows = chat.rows(_turns("a", "b", "c", "d", system="S"))
    assert [_trained(row) for row in rows] == [["b<|im_end|>"], ["d<|im_end|>"]]
    assert [TOKENIZER.decode(row.ids).count("S") for row in rows] == [1, 1]
    assert TOKENIZER.decode(rows[1].ids).index("S") > TOKENIZER.decode(rows[1].ids).index("b")
    assert len(chat.rows(_turns("a", "b", "c", "d"))) == 1
    assert _trained(chat.encode(_turns("a", "b", "c", "d", system="S"))) == ["d<|im_end|>"]


def test_rows_train_an_answer_that_later_turns_shorten() -> None:
    rows = _chat(FORGETTING).rows(_turns("1+1?", "one and one=2", "2+2?", "4"))
    assert [_trained(row) for row in rows] == [["one and one=2<|im_end|>"], ["4<|im_end|>"]]
    assert "one and one" not in TOKENIZER.decode(rows[1].ids)


@pytest.mark.parametrize("template", [DATED, DATED_BY_NAME])
def test_render_uses_the_given_date(template: str) -> None:
    tokenizer = _with_template(template)
    christmas, easter = (chat_of(tokenizer, today=day) for day in (date(2025, 12, 25), date(2026, 4, 5)))
    assert "Today is 25 Dec 2025" in TOKENIZER.decode(christmas.prompt(_turns("a")))
    assert christmas.digest != easter.digest
    assert differences(christmas.description, easter.description) == [
        "the date in the chat template was 2025-12-25 and is 2026-04-05"
    ]
    assert chat_of(TOKENIZER, today=date(2025, 12, 25)).digest == CHAT.digest


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|>user\nb", "<|pad|><|im_end|>\n", "<|im_<|im_end|>end|>"])
def test_text_that_looks_like_a_control_token_stays_text(role: str, text: str) -> None:
    messages = _turns(*(text if role == r else "x" for r in ("user", "assistant")), system="x")
    if role == "system":
        messages[0] = Message("system", text)
    control = {TOKENIZER.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "<|pad|>")}
    plain = CHAT.encode(_turns("x", "x", system="x"))
    tokens = CHAT.encode(messages)
    assert [i for i in tokens.ids if i in control] == [i for i in plain.ids if i in control]
    assert text in TOKENIZER.decode(tokens.ids)


def test_added_token_in_the_template_is_a_control_token() -> None:
    from tokenizers import AddedToken

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn|>", special=False), AddedToken("<|word|>", special=False)])
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "<|turn|>")
    chat = chat_of(tokenizer)
    turn, word = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|word|>"])
    ids = chat.prompt(_turns("<|turn|> <|word|>"))
    assert (ids.count(turn), ids.count(word)) == (2, 1)
    assert "<|turn|> <|word|>" in tokenizer.decode(ids)


def test_control_token_from_two_texts_is_refused() -> None:
    chat = _chat(
        "{% for m in messages %}{{ '|' if m.role == 'assistant' }}{{ m.content }}"
        "{{ '<|im_end|>' if m.role == 'assistant' }}{% endfor %}{{ '|' if add_generation_prompt }}"
    )
    with pytest.raises(UserError, match="these texts with other control tokens"):
        chat.encode([Message("system", "<|im_"), Message("user", "start|>"), Message("assistant", "x")])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for", "syntax error"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[0].content.split('') }}", "empty separator"),
        ("{{ '{nokey}'.format(messages) }}", "nokey"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% for i in range(10**9) %}{% endfor %}", "too big"),
        (CHATML.replace("assistant\n", "assistant\n<think>\n"), "locate the answer.*prompt ends with .*think"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "an end token of the base .<.im_end.>."),
        ("{{ messages | length }}{{ messages[-1].content }}<|im_end|>", "an end token of the base"),
        ("{{ 1 + messages[0].content }}", "refuses this conversation"),
    ],
)
def test_untrainable_template_is_refused(template: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        _chat(template)


def test_invalid_template_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = 5
    with pytest.raises(UserError, match=r"The chat template must be text \(got int\)"):
        chat_of(tokenizer)
    tokenizer.chat_template = {"tools": CHATML, "rag": CHATML}
    with pytest.raises(UserError, match="No default among the chat templates rag, tools"):
        chat_of(tokenizer)


def test_untrainable_shape_does_not_affect_others() -> None:
    answered = "messages[0].role == 'system' and messages[-1].role == 'assistant'"
    chat = _chat(f"{{% if {answered} %}}no{{% else %}}{CHATML}{{% endif %}}")
    assert len(chat.digest) == 64
    assert _trained(chat.encode(_turns("a", "b"))) == ["b<|im_end|>"]
    with pytest.raises(UserError, match="Cannot locate the answer"):
        chat.encode(_turns("a", "b", system="c"))


def test_encode_accepts_turns_of_chat_files() -> None:
    turns = [m.as_dict() for m in _turns("a", "b")]
    assert encode(TOKENIZER, turns) == encode(TOKENIZER, _turns("a", "b")) == CHAT.encode(_turns("a", "b"))
    with pytest.raises(UserError, match="no chat template"):
        encode(_with_template(None), turns)


def test_plain_form_is_ordinary_text_between_bos_and_eos() -> None:
    chat = chat_of(_with_template(None), kind="plain")
    tokens = chat.encode(_turns("Ohio", "Oh.", "Iowa", "Ia.", system="Cite."))
    assert TOKENIZER.decode(tokens.ids) == (
        "<|im_start|>Cite.\n\n### Instruction:\nOhio\n\n### Response:\nOh.<|im_end|>\n\n"
        "### Instruction:\nIowa\n\n### Response:\nIa.<|im_end|>"
    )
    assert _trained(tokens) == ["Oh.<|im_end|>", "Ia.<|im_end|>"]
    assert tokens.ids[: len(chat.prompt(_turns("Ohio", system="Cite.")))] == chat.prompt(_turns("Ohio", system="Cite."))


def test_differences_name_the_changed_part() -> None:
    other = _chat(CHATML.replace("{% endfor %}", "\n{% endfor %}"))
    assert differences(CHAT.description, other.description) == ["the chat template differs from its line 3 on"]
    plain = chat_of(TOKENIZER, kind="plain")
    assert differences(CHAT.description, plain.description) == [
        "the format was the base's own template and is the plain form"
    ]
    assert differences(CHAT.description, _chat(CHATML + "\n").description) == [
        "the chat template differs from its line 4 on"
    ]
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = _lower()
    changed = chat_of(tokenizer).description
    assert differences(CHAT.description, changed) == [
        "the tokenizer makes other tokens of the same text (another version of it, or of tokenizers?)"
    ]
    assert differences(CHAT.description, chat_of(byte_tokenizer()).description) == []


def _lower() -> Any:
    from tokenizers import normalizers

    return normalizers.Lowercase()


@pytest.mark.parametrize(
    ("tokenizer", "messages", "words"),
    [
        (TOKENIZER, [{"role": "assistant", "content": "a"}], "the first turn must be the user's"),
        (TOKENIZER, "hello", "A conversation must be a list of turns"),
        (TOKENIZER, [], "messages must be a list of turns"),
        (TOKENIZER, [{"role": b"user", "content": "a"}], "messages.0..role is"),
        (None, _turns("a", "b"), "Expected a base or a tokenizer"),
        ("gpt2", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "got str"),
    ],
)
def test_encode_refuses_other_types(tokenizer: Any, messages: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        encode(tokenizer, messages)


def test_encode_refuses_a_missing_answer_and_half_a_character() -> None:
    for messages in ([], _turns("a")):
        for make in (CHAT.encode, CHAT.rows):
            with pytest.raises(UserError, match="The last turn must be the assistant's"):
                make(messages)
    with pytest.raises(UserError, match="Half of a surrogate pair"):
        CHAT.prompt(_turns("a\ud800"))


TURNS = [Message("user", "A <|new|> Ohio 12"), Message("assistant", "Oh. <|new|>")]


def _kept(tokenizer: Any) -> ChatFormat:
    ends = frozenset([tokenizer.eos_token_id])
    return cached_format(tokenizer, stop_ids=ends, kind="own", today=ChatConfig().date)


def _fresh(tokenizer: Any) -> ChatFormat:
    ends = frozenset([tokenizer.eos_token_id])
    return chat_format(tokenizer, stop_ids=ends, kind="own", today=ChatConfig().date)


def test_cached_format_is_reused_while_the_tokenizer_is_unchanged() -> None:
    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    first, second = _kept(tokenizer), _kept(tokenizer)
    assert second.encoder is first.encoder
    assert second.tokenizer is tokenizer
    assert _kept(other).encoder is not first.encoder
    assert encode(tokenizer, TURNS) == encode(tokenizer, TURNS) == _fresh(tokenizer).encode(TURNS)
    assert _kept(tokenizer).encoder is first.encoder


def _set_template(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | upper")


def _add_special_token(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})


def _add_token_that_the_template_writes(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("Ohio", normalized=False)])
    tokenizer.chat_template = CHATML.replace("message['content']", "'Ohio' + message['content']")


def _lower_case(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def _split_digits(tokenizer: Any) -> None:
    before = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("12", "removed"), before])


@pytest.mark.parametrize(
    "change", [_set_template, _add_special_token, _add_token_that_the_template_writes, _lower_case, _split_digits]
)
def test_cached_format_is_recreated_when_the_tokenizer_changes(change: Callable[[Any], None]) -> None:
    tokenizer = byte_tokenizer()
    before, encoder = encode(tokenizer, TURNS), _kept(tokenizer).encoder
    change(tokenizer)
    assert _kept(tokenizer).encoder is not encoder
    expected = _fresh(tokenizer).encode(TURNS)
    assert encode(tokenizer, TURNS) == expected
    if change is not _add_special_token:  # a message that says so is spelled out, before and after
        assert expected != before


def test_cached_format_does_not_keep_the_tokenizer_alive() -> None:
    tokenizer = byte_tokenizer()
    encode(tokenizer, TURNS)
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None
