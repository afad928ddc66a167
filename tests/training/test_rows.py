"""Training rows: each is checked, none is cut, and the digest identifies what training saw."""

from __future__ import annotations

from dataclasses import replace

import pytest

from making.tiny_bases import CHATML, byte_tokenizer, chat_of
from making.training_runs import Heard
from tunewright.chat import ChatFormat, Tokens
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.training.rows import (
    IGNORED,
    as_columns,
    encode_members,
    expected_messages,
    render_digest,
    row_faults,
    training_rows,
)

CHAT = chat_of(byte_tokenizer())


def _member(*turns: str) -> Member:
    roles = ("user", "assistant") * len(turns)
    example = Example(tuple(Message(r, t) for r, t in zip(roles, turns, strict=False)))  # type: ignore[arg-type]
    return Member(example, example.pair_key, "train", example.pair_key)


SHORT, LONG = _member("a", "b"), _member("a" * 100, "b")


def test_training_rows_refuses_a_long_example_with_its_length() -> None:
    length = len(CHAT.encode(LONG.example.messages).ids)
    with pytest.raises(UserError, match=f"{LONG.key[:12]}.*{length} tokens"):
        training_rows(CHAT, [SHORT, LONG], length - 1, "error", LogReporter())
    rows = training_rows(CHAT, [SHORT, LONG], length, "error", LogReporter()).rows
    assert [len(row.ids) for row in rows] == [len(CHAT.encode(SHORT.example.messages).ids), length]


def test_training_rows_drops_and_names_a_long_example_when_configured() -> None:
    reporter = Heard()
    encoded = training_rows(CHAT, [LONG, SHORT], 60, "drop", reporter)
    assert encoded.rows == [CHAT.encode(SHORT.example.messages)]
    assert [row.member for row in encoded.too_long] == [LONG]
    (warning,) = reporter.warned
    assert LONG.key[:12] in warning
    with pytest.raises(UserError, match="No example is short enough"):
        training_rows(CHAT, [LONG], 60, "drop", reporter)


def test_labels_are_the_answer_ids_only() -> None:
    columns = as_columns([Tokens((5, 6, 7, 8), (False, False, True, True))])
    assert columns == {"input_ids": [[5, 6, 7, 8]], "labels": [[IGNORED, IGNORED, 7, 8]]}


def _change(tokens: Tokens, ids: dict[int, int], mask: dict[int, bool]) -> Tokens:
    return Tokens(
        tuple(ids.get(i, token) for i, token in enumerate(tokens.ids)),
        tuple(mask.get(i, trained) for i, trained in enumerate(tokens.loss_mask)),
    )


def _fault(chat: ChatFormat, row: Tokens, member: Member) -> str | None:
    (fault,) = row_faults(chat, [row], expected_messages(member, 1))
    return fault


def test_row_faults_reports_every_kind_of_broken_row() -> None:
    tokens = CHAT.encode(SHORT.example.messages)
    last = len(tokens.ids) - 1
    letter = tokens.ids[-2]
    assert _fault(CHAT, tokens, SHORT) is None
    for broken, words in [
        (_change(tokens, {0: letter}, {}), "beginning-of-text tokens"),
        (_change(tokens, {}, {last: False, last - 1: False}), "no token would be trained"),
        (_change(tokens, {}, {last: False}), "has no trained end token"),
        (_change(tokens, {last: letter}, {}), "has no trained end token"),
        (_change(tokens, {last - 1: letter + 1}, {}), "the answer's tokens read 'c', not 'b'"),
        (_change(tokens, {}, {last - 1: False}), "the answer's tokens read ''"),
        (_change(tokens, {}, {last - 3: True}), "has no trained end token"),
    ]:
        fault = _fault(CHAT, broken, SHORT)
        assert fault is not None
        assert words in fault
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHATML.replace("<|im_start|>", "|")
    once = chat_of(tokenizer)
    tokens = once.encode(SHORT.example.messages)
    assert _fault(once, tokens, SHORT) is None
    doubled = replace(tokens, ids=(once.bos_id, *tokens.ids), loss_mask=(False, *tokens.loss_mask))
    assert "2 beginning-of-text tokens" in str(_fault(once, doubled, SHORT))


SYSTEM = [Message("system", "Cite."), Message("user", "Ohio now"), Message("assistant", "Oh. Ct.")]
LONGER = [*SYSTEM, Message("user", "Iowa"), Message("assistant", "Ia.")]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}", "system turn"),
        ("message['content']", "(message['content'] if message.role != 'user' else message.content[:3])", "user turn"),
        (
            "message['content']",
            "(message['content'] if message.role != 'assistant' else message.content[:3])",
            "tokens read 'Oh.', not",
        ),
        ("message['content']", "message['content'].split() | join('')", "'Oh.Ct.', not 'Oh. Ct.'"),
        ("message['content']", "message['content'] | upper", "'OH. CT.', not"),
    ],
)
def test_row_faults_reports_a_template_that_drops_or_changes_text(before: str, after: str, words: str) -> None:
    tokenizer = byte_tokenizer()
    assert before in CHATML
    tokenizer.chat_template = CHATML.replace(before, after)
    messages = tuple(LONGER)
    example = Example(messages)
    member = Member(example, example.pair_key, "train", example.pair_key)
    (fault,) = encode_members(chat_of(tokenizer), [member], 1000).faults
    assert words in fault
    assert not encode_members(CHAT, [member], 1000).faults


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_row_faults_reports_a_character_without_a_token(unknown: str | None) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnoprstuvwxyz WZ',?\në1234"
    vocabulary = {text: i for i, text in enumerate(["<unk>", "<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    chat = chat_of(tokenizer)
    assert not encode_members(chat, [_member("a", "b")], 100).faults
    (fault,) = encode_members(chat, [_member("aqa", "b")], 100).faults
    assert "the tokens don't spell the user turn 'aqa'" in fault


def test_row_faults_accepts_shortened_earlier_answers_with_one_answer_a_row() -> None:
    tokenizer = byte_tokenizer()
    shorter = "(message['content'] if loop.last else message.content.split('=')[-1])"
    tokenizer.chat_template = CHATML.replace("message['content']", shorter)
    encoded = encode_members(chat_of(tokenizer), [_member("1+1?", "so=2", "2+2?", "so=4")], 1000)
    assert (len(encoded.rows), encoded.faults) == (2, [])


def test_encode_members_names_a_refused_example_and_checks_the_others() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML
    many = _member("a", "b", "c", "d")
    encoded = encode_members(chat_of(tokenizer), [many, SHORT], 100)
    assert encoded.members == [SHORT]
    (fault,) = encoded.faults
    assert many.key[:12] in fault
    assert "one turn only" in fault


def test_render_digest_changes_with_any_id_and_mask() -> None:
    rows = [CHAT.encode(m.example.messages) for m in (SHORT, LONG)]
    digests = {
        render_digest(rows),
        render_digest(rows[::-1]),
        render_digest([rows[0], _change(rows[1], {5: 7}, {})]),
        render_digest([rows[0], _change(rows[1], {}, {5: True})]),
        render_digest(rows[:1]),
    }
    assert len(digests) == 5
    assert render_digest(rows) == render_digest([CHAT.encode(m.example.messages) for m in (SHORT, LONG)])
