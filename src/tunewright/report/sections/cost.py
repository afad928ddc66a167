"""Tokens that a call takes by each arm, and which of them a prefix cache holds."""

from __future__ import annotations

from tunewright.evaluation.evidence import Arm, Evidence
from tunewright.report.blocks import Cell, Lead, Row, Section, Table, cells


def section(evidence: Evidence) -> Section:
    """What a call sends and what comes back, on the average."""
    first = evidence.contrasts[0]
    ours, theirs = evidence.arm(first.treatment), evidence.arm(first.control)
    head = ("Arm", "Prompt tokens", "The same in every prompt", "New in each", "Answer tokens")
    table = Table("Table of tokens", head, tuple(_row(arm) for arm in evidence.arms))
    return Section("cost", "What a call costs", (Lead(_lead(ours, theirs)), table))


def _lead(ours: Arm, theirs: Arm) -> str:
    more = theirs.prompt_tokens - ours.prompt_tokens
    told = (
        f"Mean tokens of a call. A call of {theirs.name} sends {theirs.prompt_tokens:.0f} tokens, one of {ours.name} "
    )
    told += f"{ours.prompt_tokens:.0f}: "
    if round(more) > 0:
        told += f"{theirs.prompt_tokens / ours.prompt_tokens:.1f} times as many. "
    else:
        told += "no more. "
    return (
        f"{told}What every prompt begins with a server computes once (prefix caching), so it is the tokens that are "
        "new in each prompt, and the answer's, that a call is paid for."
    )


def _row(arm: Arm) -> Row:
    share = arm.shared_tokens / arm.prompt_tokens
    return Row(
        cells(
            arm.name,
            f"{arm.prompt_tokens:.0f}",
            Cell(f"{arm.shared_tokens:,}", f"{share:.0%} of the prompt"),
            f"{arm.prompt_tokens - arm.shared_tokens:.0f}",
            "not counted" if arm.answer_tokens is None else f"{arm.answer_tokens:.1f}",
        )
    )
