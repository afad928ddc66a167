"""The conversations that a canary answers."""

from __future__ import annotations

from typing import Any

import httpx
from hypothesis import given
from hypothesis import strategies as st

from tunewright.serving.gateway.errors import parse_request
from tunewright.serving.gateway.schemas import ChatRequest
from tunewright.serving.gateway.tenant_auth import in_canary_share


def _conversation(first: str, turns: int = 0) -> Any:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": first}]
    for turn in range(turns):
        messages += [{"role": "assistant", "content": f"a{turn}"}, {"role": "user", "content": f"u{turn}"}]
    return parse_request(
        ChatRequest, httpx.Request("POST", "http://x", json={"model": "m", "messages": messages}).content
    )


@given(first=st.text(min_size=1), turns=st.integers(1, 3), low=st.floats(0.01, 0.5), more=st.floats(0, 0.4))
def test_conversation_stays_with_its_canary_when_it_or_the_share_grows(
    first: str, turns: int, low: float, more: float
) -> None:
    begun, later = _conversation(first), _conversation(first, turns)
    assert in_canary_share("acme", begun, "d", low) == in_canary_share("acme", later, "d", low)
    if in_canary_share("acme", begun, "d", low):
        assert in_canary_share("acme", begun, "d", low + more)


def test_canary_answers_its_share_of_conversations() -> None:
    answered = sum(in_canary_share("acme", _conversation(f"case {number}"), "d", 0.1) for number in range(4000))
    assert abs(answered / 4000 - 0.1) < 0.02  # four standard deviations
