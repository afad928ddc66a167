"""Timing calls: how many rows are timed, and what the rates are of."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from tunewright.advisor import costs
from tunewright.advisor.costs import measured_speed
from tunewright.chat import open_chat
from tunewright.config import ChatConfig
from tunewright.core.progress import LogReporter
from tunewright.models.bases import resolve_base
from tunewright.models.loading import load_model


def test_rates_are_tokens_by_seconds_of_as_many_rows_as_a_batch_holds(
    tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = resolve_base(str(tiny_base_folder), None, tiny_base_folder, LogReporter())
    chat = open_chat(base, ChatConfig(), LogReporter())
    model = load_model(base, "float32", "none")
    clock = itertools.count(0, 2)  # each look at it is 2 seconds after the one before
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    short = measured_speed(model, chat, [(5, 6, 7)] * 9, None, batch_size=4)
    assert (short.rows, short.prefill, short.decode) == (4, 4 * 3 / 2, 4 * 16 / 2)
    # At most this many tokens are timed, and one row in any case.
    monkeypatch.setattr(costs, "_MOST_PREFILLED", 10)
    assert measured_speed(model, chat, [(5, 6, 7)] * 9, None, batch_size=4).rows == 3
    assert measured_speed(model, chat, [(5,) * 11] * 2, None, batch_size=4).rows == 1
