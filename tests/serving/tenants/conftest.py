"""A serving state for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tunewright.serving.tenants import State


@pytest.fixture
def state(state_url: str) -> Iterator[State]:
    with State(state_url, "ann") as opened:
        yield opened
