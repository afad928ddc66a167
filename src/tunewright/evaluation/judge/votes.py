"""One reply as a verdict, and two orders as one outcome."""

from __future__ import annotations

from dataclasses import dataclass

from tunewright.evaluation.judge.prompts import Question, Verdict, read_verdict
from tunewright.evaluation.judge.replies import Reply
from tunewright.evaluation.judge.rows import Outcome

_CUT = "length"


@dataclass(frozen=True)
class Vote:
    """What the judge said to one question: a verdict, or why there is none."""

    verdict: Verdict | None
    unscored: str | None
    reply: str


def vote(question: Question, reply: Reply) -> Vote:
    """Read a reply; what cannot be read is unscored, never wrong or a tie."""
    if reply.refused is not None:
        return Vote(None, reply.refused, "")
    if reply.finish == _CUT:
        # Its last verdict may not be the one that the judge was coming to.
        return Vote(None, "cut at the token limit", reply.text)
    if not reply.text.strip():
        return Vote(None, "empty reply", reply.text)
    verdict = read_verdict(question.kind, reply.text)
    return Vote(verdict, None if verdict else "no verdict in the reply", reply.text)


def outcome(forward: Vote, backward: Vote) -> tuple[Outcome, bool]:
    """The treatment's outcome, and whether the orders disagree, which makes it a tie (as in FastChat's MT-bench).

    Args:
        forward: with the treatment's answer as A; it has a verdict.
        backward: with the treatment's answer as B; it has a verdict.
    """
    first: dict[Verdict, Outcome] = {"A": "win", "B": "loss", "tie": "tie"}
    second: dict[Verdict, Outcome] = {"A": "loss", "B": "win", "tie": "tie"}
    assert forward.verdict is not None
    assert backward.verdict is not None
    results = first[forward.verdict], second[backward.verdict]
    return (results[0], False) if results[0] == results[1] else ("tie", True)
