"""The scripted fortnight of a shadow, small: the tiny base, and right answers that are drawn from the two adapters'."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from shadow_fortnight import ALIAS, DAYS, draw_traffic, fortnight, scripted, served

from making.command_line import trained_project


def test_shadow_that_is_worse_by_a_known_amount_is_found_within_a_fortnight(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    project = scripted(trained_project(tmp_path / "project", tiny_base_folder))
    rng = np.random.default_rng(0)
    inputs = [f"case {number}" for number in range(40)]
    asks = draw_traffic(inputs, 5, rng)
    with served(project, max_tokens=4) as server:
        answers = server.measured(inputs)
        differing = [each for each in inputs if answers["live"][each] != answers["candidate"][each]]
        assert len(differing) > len(inputs) / 2, "the two adapters answer differently"
        right = {each: "candidate" if number % 8 == 0 else "live" for number, each in enumerate(inputs)}
        references = {each: answers[name][each] for each, name in right.items()}
        found = fortnight(server, references, answers, asks, 0.05, rng)
        assert server.state.verify().faults == ()
        lines = [json.loads(line.details) for line in server.state.audit.lines() if line.action == "shadow.settle"]
    status, last = found.status, found.evenings[-1]
    assert len(found.evenings) == DAYS and last.requests == len(asks)
    assert (status.unanswered, status.unrecorded, status.waiting) == (0, 0, 0)
    assert found.as_measured == 1.0, "the server answers as before"
    assert found.decided is not None and found.decided.outcome == "worse"
    assert 0 < found.wrong_verdicts < 0.15 * last.labels
    # A wrong verdict moves its unit by up to 2, and nothing else moves the mean from the units' truth.
    moved = [abs(evening.value - evening.truth) * evening.units for evening in found.evenings]
    assert 0 < max(moved) <= 2 * found.wrong_verdicts
    assert last.low - 0.1 < last.truth < last.high
    # The looks only add units, and each user is in the sequence at most once.
    units = [evening.units for evening in found.evenings]
    assert units == sorted(units) and units[0] == 0 and status.incomplete > 0
    assert last.units + status.incomplete == found.users
    assert [line["units"] for line in lines] == sorted(set(units) - {0})
    assert project.shadow.status(ALIAS).finding == status.finding
