"""A judge's preferences between the two arms: a comparison for people's verdicts, and an aid to estimates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunewright.core.progress import Reporter
from tunewright.evaluation.judge.rows import Outcome, load_judged
from tunewright.evidence.schema import Evidence

_PREFERENCES: dict[Outcome, int] = {"win": 1, "tie": 0, "loss": -1}


@dataclass(frozen=True)
class JudgePreferences:
    """A judge's name, and pair key to 1 (the treatment is better), -1 (the control is) or 0.

    Items that the judge could not score are not in it.
    """

    name: str
    preferences: Mapping[str, int]


def heard_judge(folder: Path, evidence: Evidence, reporter: Reporter) -> JudgePreferences | None:
    """Return the evaluation's judge on its deciding contrast, or None without a judge or with a vetoed one.

    Raises:
        UserError: the judge's rows cannot be read.
    """
    judgement = evidence.judge
    if judgement is None:
        return None
    if judgement.vetoed:
        reporter.warn(f"The judge {judgement.model} is vetoed: it is neither compared with people nor of help to them.")
        return None
    control = evidence.contrasts[0].control
    found = {}
    for row in load_judged(folder):
        outcome = row.pairs[control].plain.outcome if control in row.pairs else None
        if outcome is not None:
            found[row.key] = _PREFERENCES[outcome]
    return JudgePreferences(f"judge {judgement.model}", found)
