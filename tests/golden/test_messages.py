"""The words of every message, held as a text that a review reads."""

from __future__ import annotations

from messages import GOLDEN, messages


def test_every_message_is_in_the_golden_file() -> None:
    assert messages().splitlines() == GOLDEN.read_text(encoding="utf-8").splitlines(), (
        "Read what changed, and run `make messages`."
    )
