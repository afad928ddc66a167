"""A measured learning curve, and the answer to *would more data help?*; readable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunewright.config import MetricName
from tunewright.core.errors import UserError
from tunewright.evidence.common import Interval
from tunewright.evidence.power import FEWEST_CLUSTERS
from tunewright.evidence.schema import Evidence
from tunewright.metrics import points_text, score_text

CURVE_FILE = "curve.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Point(_Part):
    """One adapter of the curve."""

    share: float
    seed: Annotated[int, Field(description="Seed of the row sample and of the training.")]
    rows: Annotated[int, Field(description="Training rows of the domain.")]
    score: Annotated[float, Field(description="Score on all dev rows, as a share from 0 to 1.")]
    dev_loss: Annotated[float, Field(description="Loss of the selected epoch.")]
    adapter: Annotated[str, Field(description="The adapter's digest.")]


class Curve(_Part):
    """A learning curve; ``curve.json``."""

    schema_version: Literal[1] = 1
    id: str
    project: str
    metric: MetricName
    margin: float
    items: int
    clusters: int
    shares: tuple[float, ...]
    seeds: tuple[int, ...]
    points: list[Point]
    slope: Annotated[float, Field(description="Gain per doubling of the training rows, as a share from 0 to 1.")]
    interval: Annotated[Interval, Field(description="95% interval of the slope.")]
    method: str
    lineage: dict[str, Any]

    def mean(self, share: float) -> float:
        """Return the mean score of all seeds at one share."""
        scores = [point.score for point in self.points if point.share == share]
        return sum(scores) / len(scores)


def find_curve(curves: Path, evidence: Evidence) -> Curve | None:
    """Return the newest learning curve on an evaluation's data and base, by its metric; None if none was measured.

    Args:
        curves: the project's folder of curves.
        evidence: the evaluation's evidence.

    Raises:
        UserError: a curve that cannot be read.
    """
    found = [
        curve
        for curve in map(load_curve, sorted(curves.glob(f"[!.]*/{CURVE_FILE}")))
        if all(curve.lineage.get(key) == evidence.lineage.get(key) for key in ("dataset", "base"))
        and curve.metric == evidence.metric
    ]
    return max(found, key=lambda curve: str(curve.lineage.get("created", "")), default=None)


def load_curve(file: Path) -> Curve:
    """Load a learning curve from its ``curve.json``.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    try:
        return Curve.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        fix = "Run `tunewright train --curve`."
        raise UserError("There is no such learning curve", where=str(file), fix=fix) from None
    except ValidationError as error:
        what = f"Invalid learning curve: {' '.join(str(error).splitlines()[:3])}"
        fix = "Remove its folder; `tunewright train --curve` measures it again."
        raise UserError(what, where=str(file), fix=fix) from None


@dataclass(frozen=True)
class MoreData:
    """An answer with its reasons."""

    answer: Literal["yes", "no", "can't tell"]
    reasons: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0: more data would help, 3: it would not, 4: can't tell."""
        return {"yes": 0, "no": 3, "can't tell": 4}[self.answer]


def more_data(curve: Curve) -> MoreData:
    """Answer from the curve alone if more data would help.

    The answer is no if the whole interval of the gain per doubling lies at or below the margin. Otherwise it is yes if
    the interval lies above zero. Else, or with fewer than `FEWEST_CLUSTERS` dev clusters, it is can't tell.
    """
    points = f"{points_text(curve.slope)} points"
    interval = f"95% interval {points_text(curve.interval.low)} to {points_text(curve.interval.high)}"
    margin = f"{100 * curve.margin:g} points"
    before, whole = curve.shares[-2:]
    rows = max(point.rows for point in curve.points)
    last = (
        f"The last step, from {before:.0%} to all {rows:,} rows, brought "
        f"{points_text(curve.mean(whole) - curve.mean(before))} points: {score_text(curve.metric, curve.mean(before))} "
        f"to {score_text(curve.metric, curve.mean(whole))} on dev."
    )
    measured = f"each doubling of the training rows brought {points} ({interval})"
    answer: Literal["yes", "no", "can't tell"]
    if curve.clusters < FEWEST_CLUSTERS:
        answer = "can't tell"
        why = f"{measured}, but {curve.clusters} independent dev clusters are too few"
    elif curve.interval.high <= curve.margin:
        answer, why = "no", f"{measured}: not more than the margin of {margin} that is worth shipping"
    elif curve.interval.low > 0:
        answer, why = "yes", f"{measured}. Twice the rows would bring about as much again, if the curve continues"
    else:
        answer, why = "can't tell", f"{measured}: the interval includes both no gain and more than {margin}"
        why += ". More dev rows or --seeds would narrow it"
    return MoreData(answer, (f"Would more data help? {answer[0].upper()}{answer[1:]}: {why}.", last))
