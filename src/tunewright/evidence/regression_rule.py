"""Rule on regression benchmarks: a pure function of their section of the evidence."""

from __future__ import annotations

from dataclasses import dataclass

from tunewright.evidence.benchmarks import Benchmarks, Result, Suite


@dataclass(frozen=True)
class Standing:
    """Result of all benchmarks, with a reason per suite in plain sentences."""

    result: Result | None
    """None if no suite has a margin, so that there is no question to answer."""
    decides: bool
    """True if any suite may decide; the result is "can't tell" if suites have margins but none may decide."""
    reasons: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0: not worse, or no margin set; 3: worse; 4: can't tell."""
        return {None: 0, "not worse": 0, "worse": 3, "can't tell": 4}[self.result]


def standing(general: Benchmarks) -> Standing:
    """Return *worse* if any deciding benchmark is worse, *not worse* if none can be, else *can't tell*.

    All must be shown to be not worse, so the level needs no correction (an intersection-union test, Berger 1982).
    Without a margin there is no question, so the answer is not "can't tell".
    """
    deciding = [suite for suite in general.suites if suite.gates]
    asked = [suite for suite in general.suites if suite.margin is not None]
    reasons = tuple(suite_text(suite) for suite in general.suites) + tuple(
        f"Not measured: {reason}" for reason in general.not_measured
    )
    return Standing(_together(asked, deciding), bool(deciding), reasons)


def _together(asked: list[Suite], deciding: list[Suite]) -> Result | None:
    results = {suite.result for suite in deciding}
    if not asked:
        return None
    if "worse" in results:
        return "worse"
    return "not worse" if results == {"not worse"} else "can't tell"


def suite_text(suite: Suite) -> str:
    """Return a sentence about a suite: its measurement and result."""
    return f"{_measured(suite)} {_follows(suite)}"


def _measured(suite: Suite) -> str:
    if suite.unit == "share":
        scores = f"{suite.base:.1%} with the adapter off, {suite.tuned:.1%} with it on"
    else:
        scores = f"{suite.base:.3f} nats per token with the adapter off, {suite.tuned:.3f} with it on"
    limit = _amount(suite, suite.limit)
    if suite.drop < 0:
        change = f"better by {_amount(suite, -suite.drop)}, worse by at most {limit} (95%)"
    else:
        change = f"worse by {_amount(suite, suite.drop)}, at most {limit} (95%)"
    alike = "" if suite.clusters in (None, suite.items) else f" in {suite.clusters:,} clusters"
    return f"{suite.name}, {suite.items:,} items{alike}: {scores}; {change}."


def _follows(suite: Suite) -> str:
    if suite.margin is None:
        return "It has no margin, so it decides nothing."
    margin = _amount(suite, suite.margin)
    if suite.failed:
        failed = suite.failed[0]
        return f"It decides nothing: {failed.name} scored {_score(suite, failed.score)}, but must be {failed.wanted}."
    if suite.result == "worse":
        return f"The whole interval lies above the margin of {margin}: the adapter is worse here than the base."
    if suite.result == "not worse":
        return f"That is below the margin of {margin}: not worse."
    needed = f" About {suite.items_needed:,} items would settle it." if suite.items_needed else ""
    return f"Against a margin of {margin} this many items can't tell.{needed}"


def _amount(suite: Suite, drop: float) -> str:
    if suite.unit == "share":
        return f"{round(100 * drop, 1) + 0.0:g} points"
    return f"{round(drop, 3) + 0.0:g} nats"


def _score(suite: Suite, score: float) -> str:
    return f"{score:.1%}" if suite.unit == "share" else f"{score:.3f} nats"
