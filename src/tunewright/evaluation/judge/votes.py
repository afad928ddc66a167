"""One reply as a verdict, and two orders as one outcome."""

from __future__ import annotations

from dataclasses import dataclass

from tunewright.evaluation.judge.prompts import Question, Verdict, read_verdict
from tunewright.evaluation.judge.replies import Reply
from tunewright.evaluation.judge.rows import Outcome

_CUT = "length"


@dataclass(frozen=True)
class Vote:
    """The judge's answer to one question: a verdict, or the reason for a missing one."""

    verdict: Verdict | None
    unscored: str | None
    reply: str


def vote(question: Question, reply: Reply) -> Vote:
    """Read a reply; an unreadable one is unscored, never wrong or a tie."""
    if reply.refused is not None:
        return Vote(None, reply.refused, "")
    if reply.finish == _CUT:
        # A truncated reply may end before the judge's final verdict.
        return Vote(None, "cut at the token limit", reply.text)
    if not reply.text.strip():
        return Vote(None, "empty reply", reply.text)
    verdict = read_verdict(question.kind, reply.text)
    return Vote(verdict, None if verdict else "no verdict in the reply", reply.text)


def outcome(forward: Vote, backward: Vote) -> tuple[Outcome, bool]:
    """Return the treatment's outcome; orders that disagree make it a tie (as in FastChat's MT-bench).

    Args:
        forward: vote with the treatment's answer as A; it has a verdict.
        backward: vote with the treatment's answer as B; it has a verdict.
    """
    first: dict[Verdict, Outcome] = {"A": "win", "B": "loss", "tie": "tie"}
    second: dict[Verdict, Outcome] = {"A": "loss", "B": "win", "tie": "tie"}
    assert forward.verdict is not None
    assert backward.verdict is not None
    results = first[forward.verdict], second[backward.verdict]
    return (results[0], False) if results[0] == results[1] else ("tie", True)
