"""Secrets and personal data: findings, lookalikes, reports without values, and consistent redaction."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from secret_samples import NEGATIVES, Sample, negatives, positives, with_iban_check, with_luhn

from making.property_examples import examples
from making.real_data import DATA_SETS, SHARED
from tunewright.config import DataConfig, Findable
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import add
from tunewright.data.examples import Example, Message
from tunewright.data.pii import LABELS, allowed_note, blocked, find, redact, redact_value, scan, warned
from tunewright.data.pii.personal import iban_valid, luhn
from tunewright.data.pii.secret_patterns import checksummed

POSITIVES = positives(seed=7, each=30)
BY_KIND = sorted({sample.name for sample in POSITIVES})


def _found(text: str) -> list[tuple[str, str]]:
    return [(finding.kind, text[finding.start : finding.end]) for finding in find(text)]


def _example(*turns: str) -> Example:
    """A conversation; its first turn is the system's."""
    roles = ["system"] + ["user", "assistant"] * len(turns)
    return Example(tuple(Message(role, text) for role, text in zip(roles, turns, strict=False)))  # type: ignore[arg-type]


def _sample(name: str) -> Sample:
    return next(sample for sample in POSITIVES if sample.name == name)


def _small_numbers(address: str) -> bool:
    return ":" not in address and all(int(part) < 100 for part in address.split("."))


@pytest.mark.parametrize("name", BY_KIND)
def test_find_detects_every_kind_completely(name: str) -> None:
    samples = [sample for sample in POSITIVES if sample.name == name]
    if name == "ip_address":  # four numbers under 100 are a section or a version unless they are called an address
        samples = [sample for sample in samples if not _small_numbers(sample.expected[0][1])]
    missed = [sample.text for sample in samples if Counter(_found(sample.text)) != Counter(sample.expected)]
    assert missed == []


@pytest.mark.parametrize("name", [name for name in NEGATIVES if name != "bare 16 digits"])
def test_find_ignores_lookalikes(name: str) -> None:
    found = [(sample.text, _found(sample.text)) for sample in negatives(seed=11, each=100) if sample.name == name]
    wrong = [(text, kinds) for text, kinds in found if kinds]
    # Of wrong IBANs, one in some hundreds ends like a phone number.
    assert len(wrong) <= (1 if name == "bad IBAN" else 0), wrong


def test_find_accepts_only_plausible_card_numbers() -> None:
    samples = [sample.text for sample in negatives(seed=11, each=400) if sample.name == "bare 16 digits"]
    found = [text for text in samples if find(text)]
    assert len(found) < 0.05 * len(samples)
    assert all(luhn(re.sub(r"\D", "", text)) for text in found)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("My card: 4539 1488 0343 6467, exp 12/27", ["card"]),
        ("Wire it to IBAN DE27100777770209299700 (BIC NORSDE51XXX)", ["iban"]),
        ("Server 91.75.86.52 is down", ["ip_address"]),
        ("see 91.75.86.52 in the manual", []),
        ("version 185.220.101.4", []),
        ("ssh root@185.220.101.4", ["ip_address"]),
        ("SSN: 212 45 6798", ["us_ssn"]),
        ("patient id 00481516, DOB 3/14/1962", ["record_number", "birth_date"]),
        ('{"patient_id": "00481516", "date_of_birth": "1962-03-14"}', ["record_number", "birth_date"]),
        ("Abraham Lincoln was born on February 12, 1809", []),
        ("Call 911, or text 12345 to win 10 000 000", []),
        ("call me on 2024-05-17 or 17.05.2024", []),
        ("iPhone 13128256512", []),
        ("mailto:maria@uni-bonn.de?subject=x", ["email"]),
        ("写信到maria@uni-bonn.de吧", ["email"]),
        ("@maria@social.coop and git@github.com:a/b.git", []),
        ("std::vector a::b 2001:4860::", []),
        ("https://maria@uni-bonn.de/ and https://host:8080/a@b", []),
    ],
)
def test_find_uses_the_context(text: str, kinds: list[str]) -> None:
    assert [kind for kind, _ in _found(text)] == kinds


@pytest.mark.parametrize(
    "text",
    [
        "password: hunter2",
        "Password: Tr0ub4dor&3",
        "the login is bob, pwd=hunter2 thanks",
        '{"user": "bob", "password": "correct7horse"}',
        "**Password:** Xk29!pqa.",
        "Passwort: Sommer2024!",
        "password: Blue#Moon",
    ],
)
def test_find_detects_a_password_by_its_name(text: str) -> None:
    assert [kind for kind, _ in _found(text)] == ["password"]
    redacted, _ = redact(_example("x", text, "ok"))
    assert "<PASSWORD_1>" in redacted.messages[1].content


@pytest.mark.parametrize(
    "text",
    [
        "password: the one you chose",
        "Password: required!",
        "password: ********",
        "password=${DB_PASSWORD}",
        "password: <PASSWORD_1>",
        "password: {{ vault.pw1 }}",
        "password: your-password-1",
        "password: changeme123",
        "password: P@ssw0rd",
        "password = os.environ['X1']",
        "password = getpass.getpass()",
        "password: config.db.pw1",
        "password=request.form.pw1",
        "password: string;",
        "password: at least 8 characters",
        "pwd: /home/u1/x",
        "Password Recovery: step2",
        "password: https://x.io/a1b2c3",
    ],
)
def test_find_ignores_mentions_of_passwords(text: str) -> None:
    assert "password" not in [kind for kind, _ in _found(text)]


def test_find_prefers_tokens_in_urls_and_no_email_in_passwords() -> None:
    ((_, token),) = _sample("gitlab_token").expected
    assert _found(f"git clone https://oauth2:{token}@gitlab.com/a/b.git") == [("gitlab_token", token)]
    assert _found("amqp://svc:hunter2Zq@mail.startup.io") == [("url_credentials", "svc:hunter2Zq")]
    assert _found("amqp://ann@corp.io:hunter2Zq@mq.io") == [("url_credentials", "ann@corp.io:hunter2Zq")]
    assert _found("psql postgres://ann:p@ss!word9@db.startup.io/x") == [("url_credentials", "ann:p@ss!word9")]


def test_find_detects_a_truncated_private_key_without_the_text_after_it() -> None:
    key = _sample("private_key").expected[0][1].partition("\n-----END")[0]
    assert _found(f"{key}\n\nCan you see my key?") == [("private_key", key)]


def test_checksums_match_published_numbers() -> None:
    # An expired token that shows the format, from the gist of a library for it (therootcompany/base62-token.js).
    assert checksummed("ghp_" + "zQWBuTSOoRi4A9spHcVY5ncnsDkxkJ" + "0mLq17")
    # The registry's examples (SWIFT, IBAN registry) and the card processors' test numbers.
    for iban in (
        "GB29NWBK60161331926819",
        "FR1420041010050500013M02606",
        "NO9386011117947",
        "MT84MALT011000012345MTLCAST001S",
    ):
        assert iban_valid(iban)
    for card in ("4242424242424242", "378282246310005", "6011111111111117", "30569309025904", "2223003122003222"):
        assert luhn(card)


@given(st.text("0123456789", min_size=11, max_size=18), st.data())
def test_checksums_fail_when_a_digit_is_wrong(body: str, data: st.DataObject) -> None:
    place, step = data.draw(st.integers(0, len(body) - 1)), data.draw(st.integers(1, 9))
    wrong = body[:place] + str((int(body[place]) + step) % 10) + body[place + 1 :]
    card, iban = with_luhn(body), with_iban_check("DE", body)
    assert luhn(card)
    assert not luhn(wrong + card[-1])
    assert iban_valid(iban)
    assert not iban_valid(iban[:4] + wrong)


@given(st.text(max_size=200) | st.text("0123456789 .-+()@:/AKIsk_xogh", max_size=200))
def test_find_returns_ordered_disjoint_findings(text: str) -> None:
    end = 0
    for finding in find(text):
        assert end <= finding.start < finding.end <= len(text)
        assert finding.kind in LABELS
        end = finding.end


def test_scan_reports_no_values() -> None:
    rows = [(f"a.jsonl:{i}", _example("Answer.", sample.text, "Yes.")) for i, sample in enumerate(POSITIVES, start=1)]
    result = scan(rows)
    reported = [
        repr(result),
        json.dumps(result.as_dict()),
        warned(result),
        str(blocked(result)),
        *map(str, result.places),
    ]
    for sample in POSITIVES:
        for _, value in sample.expected:
            assert not any(value in text for text in reported)


def test_scan_reports_row_turn_and_offsets_and_counts() -> None:
    mail, other = "maria@uni-bonn.de", "b.ok@startup.io"
    rows = [
        ("a.jsonl:3", _example(f"Sign as {other}.", "Hello", f"Write to {mail} or {other}")),
        ("a.jsonl:4", _example(f"Sign as {other}.", "Bye", "Bye")),
    ]
    listener = Listener()
    result = scan(rows, listener)
    places = [(p.row, p.message, p.role, p.finding.start, p.finding.end) for p in result.places]
    assert places == [
        ("a.jsonl:3", 0, "system", 8, 8 + len(other)),
        ("a.jsonl:3", 2, "assistant", 9, 9 + len(mail)),
        ("a.jsonl:3", 2, "assistant", 9 + len(mail) + 4, 9 + len(mail) + 4 + len(other)),
        ("a.jsonl:4", 0, "system", 8, 8 + len(other)),
    ]
    assert result.counts == {"email": 4}
    assert list(listener.steps.values()) == [(2, 2)]


def test_redact_gives_a_value_one_placeholder_in_any_spelling() -> None:
    example = _example(
        "Be brief.",
        "I am Maria@uni-bonn.de, my friend is b.ok@startup.io. Card 4539 1488 0343 6467, call me at 415 555 2671",
        "maria@uni-bonn.de (and b.ok@startup.io) pays with 4539-1488-0343-6467. I'll try 4155552671; not 14155552671.",
    )
    redacted, counts = redact(example)
    assert [m.content for m in redacted.messages] == [
        "Be brief.",
        "I am <EMAIL_1>, my friend is <EMAIL_2>. Card <CARD_1>, call me at <PHONE_1>",
        "<EMAIL_1> (and <EMAIL_2>) pays with <CARD_1>. I'll try <PHONE_1>; not 14155552671.",
    ]
    assert counts == {"email": 4, "card": 2, "phone": 2}


def test_redact_replaces_a_value_in_every_turn() -> None:
    sample = next(s for s in POSITIVES if s.name == "aws_secret" and len(s.expected) == 2)
    (secret,) = [value for kind, value in sample.expected if kind == "aws_secret"]
    assert find(f"It was {secret}.") == []
    redacted, _ = redact(_example("x", sample.text, f"It was {secret}."))
    assert redacted.output == "It was <AWS_SECRET_1>."


def test_redact_continues_existing_placeholder_numbers() -> None:
    redacted, counts = redact(_example("x", "From <EMAIL_2>", "To maria@uni-bonn.de"))
    assert redacted.output == "To <EMAIL_3>"
    assert counts == {"email": 1}


def test_redact_keeps_weights_and_roles() -> None:
    turns = (Message("user", "a@uni-bonn.de"), Message("assistant", "a@uni-bonn.de", 0), Message("user", "b"))
    redacted, _ = redact(Example((*turns, Message("assistant", "c"))))
    assert [(m.role, m.weight) for m in redacted.messages] == [
        ("user", 1),
        ("assistant", 0),
        ("user", 1),
        ("assistant", 1),
    ]


def test_allowed_kinds_are_counted_and_reported_only() -> None:
    key, mail = _sample("stripe_key").expected[0][1], "maria@uni-bonn.de"
    rows = [("a.jsonl:8", _example("Answer.", f"key {key}", f"Ask {mail}, or call 415-555-2671"))]
    result = scan(rows, allow=["stripe_key", "phone"])
    assert result.counts == {"stripe_key": 1, "email": 1, "phone": 1}
    assert result.of("secret") == ()
    assert [place.finding.kind for place in result.of("personal")] == ["email"]
    reported = allowed_note(result)
    assert reported.count("\n") == 0
    assert "Stripe live key: 1, phone number: 1, in 1 row" in reported
    assert key not in reported
    assert allowed_note(scan(rows)) == ""


def test_redact_keeps_allowed_values_completely() -> None:
    example = _example("x", "Write to ann@uni-bonn.de or call 415-555-2671", "Not ann@uni-bonn.de: 415-555-2671")
    redacted, counts = redact(example, allow=["phone"])
    assert [m.content for m in redacted.messages][1:] == [
        "Write to <EMAIL_1> or call 415-555-2671",
        "Not <EMAIL_1>: 415-555-2671",
    ]
    assert counts == {"email": 2}
    within = _example("x", "Connect to amqp://ann@corp.io:hunter2Zq@mq.io", "It is for ann@corp.io, as you know")
    kept, _ = redact(within, allow=["url_credentials"])
    assert [m.content for m in kept.messages][1:] == [
        "Connect to amqp://ann@corp.io:hunter2Zq@mq.io",
        "It is for <EMAIL_1>, as you know",
    ]


def test_config_accepts_every_kind() -> None:
    assert set(get_args(Findable)) == set(LABELS)
    assert DataConfig.model_validate({"allow": ["phone"]}).allow == ("phone",)
    with pytest.raises(ValidationError, match="github_token"):
        DataConfig.model_validate({"allow": ["telephone"]})


def test_add_accepts_allowed_kinds_and_the_error_names_the_option(tmp_path: Path) -> None:
    key = _sample("stripe_key").expected[0][1]
    pairs = [*unlike_pairs(60), ("Which key is for tests?", f"It is {key}")]
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    project = new_project(tmp_path / "p")
    with pytest.raises(UserError) as caught:
        add(project, [path], Listener())
    assert "data.allow: [stripe_key]" in (caught.value.fix or "")
    config = project.config
    changed = config.model_copy(update={"data": config.data.model_copy(update={"allow": ("stripe_key",)})})
    listener = Listener()
    added = add(ProjectFolder(project.root, changed), [path], listener)
    assert (added.added, added.personal) == (61, {"stripe_key": 1})
    assert any("Permitted by data.allow: Stripe live key: 1" in said for said in listener.said)


@examples(300)
@given(st.lists(st.sampled_from(POSITIVES), min_size=1, max_size=5), st.sampled_from([" ", "\n", ", ", "; "]))
def test_redact_is_complete_and_idempotent(samples: list[Sample], between: str) -> None:
    texts = [sample.text for sample in samples]
    example = _example(texts[0], between.join(texts), between.join(reversed(texts)))
    found = sum(len(find(message.content)) for message in example.messages)
    redacted, counts = redact(example)
    assert [find(message.content) for message in redacted.messages] == [[], [], []]
    assert sum(counts.values()) >= found
    assert redact(redacted) == (redacted, {})


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not there")
@pytest.mark.parametrize("name", ["banking77", "snips_slots", "pubmedqa"])
def test_find_detects_nothing_in_clean_real_data(name: str) -> None:
    rows = [(f"{name}:{i}", example) for i, example in enumerate(DATA_SETS[name](), start=1)]
    assert scan(rows).counts == {}


def test_redact_value_opens_json_texts_and_numbers_placeholders_as_asked() -> None:
    asked: list[tuple[str, str]] = []

    def number(kind: str, value: str) -> int:
        asked.append((kind, value))
        return 100_000 + len(asked)

    arguments = json.dumps({"to": ["Maria@uni-bonn.de"], "card": 4539578763621486, "password": "hunter2-Vq8"})
    given = {"arguments": arguments, "content": "to maria@uni-bonn.de", "n": 3, "other": '{"b": [1]}', "text": "{x"}
    value, counts = redact_value(given, number)
    assert json.loads(value.pop("arguments")) == {
        "to": ["<EMAIL_100001>"],
        "card": "<CARD_100002>",
        "password": "<PASSWORD_100003>",
    }
    assert value == {"content": "to <EMAIL_100001>", "n": 3, "other": '{"b": [1]}', "text": "{x"}
    assert counts == {"email": 2, "card": 1, "password": 1}
    assert asked[0] == ("email", "maria@uni-bonn.de")


@pytest.mark.parametrize("kind", LABELS)
def test_placeholder_with_six_digits_is_no_finding(kind: str) -> None:
    placeholder = f"<{kind.upper()}_493817>"
    value = {"password": placeholder, "text": f"{placeholder} {placeholder}, born {placeholder}", kind: placeholder}
    assert redact_value(value, lambda _kind, _value: 0) == (value, {})
