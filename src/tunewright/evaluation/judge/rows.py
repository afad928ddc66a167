"""Each item's verdicts, next to the evidence: ``judge.jsonl``; of the controls: ``judge-controls.jsonl``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from tunewright.core.errors import UserError
from tunewright.evidence.common import Part
from tunewright.evidence.judge import ControlName

ROWS_FILE = "judge.jsonl"
CONTROLS_FILE = "judge-controls.jsonl"

Outcome = Literal["win", "tie", "loss"]


class ArmCorrectness(Part):
    """The correctness of one arm's answer."""

    correct: Annotated[bool | None, Field(description="null: unscored.")]
    exact: Annotated[bool, Field(description="It equals the reference, so the judge was not asked.")] = False
    unscored: Annotated[str | None, Field(description="Reason for a missing verdict.")] = None
    reply: Annotated[str | None, Field(description="The judge's reply.")] = None


class ArmPreference(Part):
    """One arm's answer against another's; win and loss are the treatment's."""

    outcome: Annotated[Outcome | None, Field(description="null: unscored.")]
    equal: Annotated[bool, Field(description="The answers are equal, so the judge was not asked.")] = False
    flipped: Annotated[bool, Field(description="The two orders disagree: a tie.")] = False
    unscored: Annotated[str | None, Field(description="Reason for a missing verdict.")] = None
    replies: Annotated[tuple[str, ...], Field(description="Replies with the treatment as A, then as B.")] = ()


class Pair(Part):
    """Both answers unchanged, and without markdown where a text has any."""

    plain: ArmPreference
    stripped: ArmPreference | None = None


class JudgedItem(Part):
    """One item; a line of ``judge.jsonl``."""

    key: Annotated[str, Field(description="The example's pair key.")]
    correctness: Annotated[dict[str, ArmCorrectness], Field(description="By arm.")]
    pairs: Annotated[dict[str, Pair], Field(description="The treatment against each opponent, by opponent.")]


class ControlRow(Part):
    """One case whose answer is known; a line of ``judge-controls.jsonl``."""

    key: str
    control: ControlName
    passed: bool
    unscored: str | None
    replies: tuple[str, ...]


def load_judged(folder: Path) -> list[JudgedItem]:
    """Read ``judge.jsonl`` next to the evidence in ``folder``."""
    file = folder / ROWS_FILE
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError("The file has no judged items", where=str(file), fix="Run `tunewright judge`.") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(JudgedItem.model_validate_json(line))
        except ValidationError as error:
            what = " ".join(str(error).splitlines()[1:3])
            raise UserError(f"Invalid judged item: {what}", where=f"{file}:{number}") from None
    return rows
