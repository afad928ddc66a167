"""Schema of ``advice/ID.json``: the measured signals; readable without torch or the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from tunewright.config import MetricName
from tunewright.core.errors import UserError
from tunewright.evidence.common import ArmScore, Interval, Part
from tunewright.evidence.schema import Advice, Contrast, Evidence

SCHEMA_VERSION: Literal[2] = 2

Answer = Literal["yes", "no", "unclear"]


# Context budget


class ShotPoint(Part):
    """One number of demonstrations."""

    arm: str
    shots: int
    score: ArmScore
    prompt_tokens: Annotated[float, Field(description="Mean prompt length in tokens.")]


class Doubling(Part):
    """Gain of the last step of a curve over demonstrations or training rows, on the same items."""

    before: Annotated[int, Field(description="Demonstrations or rows; at most half as many as after.")]
    after: int
    difference: Annotated[
        float, Field(description="Gain per doubling; the step itself may differ from exactly one doubling.")
    ]
    interval: Annotated[Interval, Field(description="95% interval of the gain per doubling.")]


class ShotCurve(Part):
    """The score by number of demonstrations, for one kind of demonstrations."""

    name: Annotated[
        str, Field(description="static, or retrieved and by what; with several draws, the best draw at each k.")
    ]
    points: Annotated[list[ShotPoint], Field(min_length=2, description="Points by k, zero-shot (k = 0) first.")]
    best: Annotated[int, Field(description="The k with the highest score; the smallest of equal ones.")]
    enough: Annotated[
        int, Field(description="k*: the smallest k whose paired difference from the best is less than the margin.")
    ]
    tokens_per_example: Annotated[float, Field(description="Mean tokens that one demonstration adds to a prompt.")]
    most: Annotated[
        int, Field(description="k_max: demonstrations that fit together with nearly all queries and answers.")
    ]
    last: Annotated[Doubling | None, Field(description="Last doubling of k; None if only one k was tried.")]
    rising: Annotated[
        Answer,
        Field(
            description="Effect of the last doubling. yes: its interval is above 0; no: not above the margin; else "
            "unclear."
        ),
    ]

    @property
    def room(self) -> bool:
        """True if twice the tried number of demonstrations would fit."""
        return 2 * self.points[-1].shots <= self.most


class ContextBudget(Part):
    """Signal (a): fit of the task's demonstrations into a prompt."""

    items: Annotated[int, Field(description="Dev items of the curves: those answered by every prompting arm.")]
    context: Annotated[int, Field(description="The base's context length in tokens.")]
    query_p99: Annotated[
        int, Field(description="99th percentile of the dev prompts without demonstrations, in tokens.")
    ]
    output_p99: Annotated[int, Field(description="99th percentile of the training answers, in tokens.")]
    curves: list[ShotCurve]


# Break-even


class Call(Part):
    """An average call of one arm."""

    arm: str
    input_tokens: float
    cached_tokens: Annotated[
        float, Field(description="Those shared by the beginning of all prompts, which a prefix cache holds.")
    ]
    output_tokens: Annotated[float, Field(description="Includes the end token.")]
    cost: Annotated[float, Field(description="Cost in the unit of `BreakEven`.")]


class Speed(Part):
    """Tokens per second measured on this machine with a batch."""

    prefill: float
    decode: float
    rows: int


class OneOffCost(Part):
    """Costs of fine-tuning other than calls, in the unit of `BreakEven`."""

    training: float
    evaluation: float
    labelling: float
    hosting: Annotated[float, Field(description="Total of all months.")]

    @property
    def total(self) -> float:
        """The sum."""
        return self.training + self.evaluation + self.labelling + self.hosting


class BreakEven(Part):
    """Signal (b): the number of calls from which a fine-tune pays through shorter prompts."""

    unit: Literal["money", "machine hours"]
    prompting: Call
    tuned: Call
    speed: Annotated[dict[str, Speed], Field(description="Arm name to speed, if there are no token prices.")]
    saving: Annotated[float, Field(description="Saving per call: prompting minus tuned.")]
    saving_interval: Annotated[Interval, Field(description="95% interval, by bootstrap of token counts over clusters.")]
    once: OneOffCost
    calls: Annotated[float | None, Field(description="V*: once / saving. None if training never pays.")]
    calls_low: Annotated[float | None, Field(description="Lower end of the 95% interval; None if never.")]
    calls_high: Annotated[float | None, Field(description="Upper end; None if never.")]
    calls_per_month: float | None
    months: int

    @property
    def expected_calls(self) -> float | None:
        """Expected calls over all months; None if the config does not state them."""
        return None if self.calls_per_month is None else self.calls_per_month * self.months

    @property
    def pays(self) -> Answer:
        """Answer by the expected calls: above the whole interval of V* (yes), below it (no), or unknown."""
        if self.calls_low is None:
            return "no"
        if self.expected_calls is None:
            return "unclear"
        if self.expected_calls < self.calls_low:
            return "no"
        return "yes" if self.calls_high is not None and self.expected_calls >= self.calls_high else "unclear"


# Gain


class PilotPart(Part):
    """An adapter trained on a part of the training rows."""

    rows: int
    score: ArmScore
    adapter: Annotated[str, Field(description="The adapter's digest.")]
    seconds: Annotated[float, Field(description="Training time in seconds.")]


class TuningGain(Part):
    """Signal (c): a pilot adapter against the best prompting arm, on the same dev items."""

    parts: Annotated[list[PilotPart], Field(min_length=1, description="Nested parts; the last one is the pilot.")]
    all_rows: Annotated[int, Field(description="Training rows of the domain.")]
    contrast: Annotated[Contrast, Field(description="Contrast of the pilot with the best prompting arm.")]
    slope: Annotated[
        Doubling | None,
        Field(description="Gain from the smaller part to the pilot, per doubling; None without a smaller part."),
    ]

    @property
    def pilot(self) -> PilotPart:
        """The adapter that is compared with prompting."""
        return self.parts[-1]


class Signals(Part):
    """All measured signals; ``advice/ID.json``."""

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    id: Annotated[str, Field(description="12 hex digits of a digest of everything that determines the measurement.")]
    project: str
    metric: Annotated[MetricName, Field(description="The config's first metric, which decides.")]
    margin: float
    items: Annotated[int, Field(description="Number of dev items.")]
    clusters: Annotated[int, Field(description="Independent clusters among them.")]
    pairs: Annotated[int, Field(description="Pairs of the domain in all splits.")]
    prompting: Annotated[Advice, Field(description="The prompting arms on dev, and the best one.")]
    cheapest: Annotated[
        str,
        Field(
            description="The arm with the fewest prompt tokens whose paired difference from the best is less than "
            "the margin."
        ),
    ]
    context: ContextBudget
    break_even: BreakEven | None
    gain: TuningGain | None
    left_out: Annotated[dict[str, str], Field(description="Signal name to the reason why it was not measured.")]
    lineage: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _without_specificity(cls, values: Any) -> Any:
        """Leave out a signal of schema 1 that decided nothing."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name != "specificity"}


def load_signals(file: Path) -> Signals:
    """Load ``advice/ID.json``."""
    try:
        return Signals.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = " ".join(str(error).splitlines()[:3])
        fix = "Remove it; `tunewright advise` measures it again."
        raise UserError(f"Not advice of schema 1 or {SCHEMA_VERSION}: {first}", where=str(file), fix=fix) from None


def find_advice(folder: Path, name: str | Path) -> Path:
    """Return the file of stored advice, by its ID or path."""
    place = next((p for p in (Path(name), folder / f"{name}.json") if p.is_file()), None)
    if place is None:
        known = sorted(file.stem for file in folder.glob("[!.]*.json"))
        there = f"Use one of: {', '.join(known)}." if known else "Run `tunewright advise`."
        raise UserError(f"No advice {str(name)!r}", where=str(folder), fix=there)
    return place


def find_matching_advice(folder: Path, evidence: Evidence) -> Signals | None:
    """Return the newest advice on an evaluation's data, base and metric, preferring advice with a break-even."""
    found = []
    for file in sorted(folder.glob("[!.]*.json")):
        signals = load_signals(file)
        same = all(signals.lineage.get(key) == evidence.lineage.get(key) for key in ("dataset", "base"))
        if same and signals.metric == evidence.metric:
            found.append(signals)
    newest_last = sorted(found, key=lambda s: (s.break_even is not None, str(s.lineage.get("created", ""))))
    return newest_last[-1] if newest_last else None
