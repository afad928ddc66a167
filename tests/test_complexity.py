"""The cost of twice the text is at most 2.5 times the cost: counted, in lines of Python that are executed.

Lines are the same on any machine. They do not count work inside a regular expression or another native call;
`benchmarks/complexity.py`, which `make fuzz` runs, measures the processor time of the same cases.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from itertools import groupby
from types import FrameType
from typing import Any

import pytest

from making.complexity_cases import CASES, MAX_GROWTH, Case

N = 500


def _lines(use: Callable[[], object]) -> int:
    """Count the lines of Python that run in a call."""
    count = 0

    def line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return line

    before = sys.gettrace()
    gc.disable()  # it would run finalizers of other tests' objects, whose lines are not this call's
    sys.settrace(line)
    try:
        use()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def _require_linear(case: Case, n: int) -> None:
    short, long = case.text(n), case.text(4 * n)
    case.use(case.text(1))  # fills caches
    few, many = _lines(lambda: case.use(short)), _lines(lambda: case.use(long))
    assert many <= MAX_GROWTH**2 * few, f"{case}: {few:,} lines for {n:,} characters, {many:,} for {4 * n:,}"


# Together, since most cases take less time than a test of their own does.
GROUPS = {name: list(cases) for name, cases in groupby(CASES, key=lambda case: case.name.partition(":")[0])}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_executed_lines_grow_with_the_text(group: str) -> None:
    for case in GROUPS[group]:
        _require_linear(case, N)


def test_counted_lines_show_quadratic_growth() -> None:
    def pairs(text: str) -> int:
        return sum(1 for a in text for b in text if a == b)

    with pytest.raises(AssertionError, match="pairs: "):
        _require_linear(Case("pairs", lambda n: "a" * n, pairs), 50)
