"""The time of an evaluation, estimated from earlier answers and suites of the project on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunewright.evaluation.speeds import Speeds
from tunewright.evaluation.time_limit import Work
from tunewright.evaluation.workload import expected_time


def _speeds(folder: Path, **decides: Any) -> Speeds:
    return Speeds(folder, {"base": "a", **decides})


def test_time_is_that_of_the_arm_or_of_all_timed_arms(tmp_path: Path) -> None:
    speeds = _speeds(tmp_path)
    works = [Work("zero-shot", 10), Work("another", 4), Work("kept", 0, kept=8)]
    assert speeds.of_answers(works) is None and speeds.of_answers(works[2:]) == 0
    speeds.add_answers("zero-shot", 10, 60.0, True)
    assert speeds.of_answers(works) == pytest.approx(14 * 6)
    # The model was already loaded: this time is the better one, and a later start does not replace it.
    speeds.add_answers("zero-shot", 10, 20.0, False)
    speeds.add_answers("zero-shot", 10, 90.0, True)
    speeds.add_answers("tuned", 30, 20.0, False)
    assert _speeds(tmp_path).of_answers(works) == pytest.approx(10 * 2 + 4 * 1)
    assert _speeds(tmp_path, device="cuda").of_answers(works) is None, "another device"


def test_suites_are_part_of_the_time_once_they_were_timed(tmp_path: Path) -> None:
    speeds, works = _speeds(tmp_path), [Work("zero-shot", 30)]
    seconds, text = expected_time(speeds, works, ["own samples"])
    assert seconds is None and "not known before the first answers" in text and text.endswith("yet: own samples.")
    speeds.add_answers("zero-shot", 10, 20.0, False)
    seconds, text = expected_time(speeds, works, ["own samples"])
    assert seconds == 60 and text.startswith("About 60 seconds, by earlier answers") and "yet: own samples." in text
    speeds.add_suite("own samples", 540.0)
    seconds, text = expected_time(speeds, works, ["own samples"])
    assert (
        seconds == 600
        and text.startswith("About 10 minutes, ")
        and text.endswith("; 9 minutes of them for checks of general abilities.")
    )
    speeds.add_answers("tuned", 1000, 20.0, False)
    assert expected_time(speeds, [Work("tuned", 10)], [])[1].startswith("About 1 second, ")
    # A suite that was resumed took a part of its time only.
    speeds.add_suite("own samples", 1.0)
    assert speeds.of_suite("own samples") == 270
