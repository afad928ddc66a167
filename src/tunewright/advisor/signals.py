"""What advice rests on, as it was measured: the schema of ``advice/ID.json``, readable without torch or the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from tunewright.config import MetricName
from tunewright.core.errors import UserError
from tunewright.evidence.base import ArmScore, Interval, Part
from tunewright.evidence.schema import Advice, Contrast, Evidence

SCHEMA_VERSION: Literal[1] = 1

Answer = Literal["yes", "no", "unclear"]


# Context budget


class ShotPoint(Part):
    """One number of demonstrations."""

    arm: str
    shots: int
    score: ArmScore
    prompt_tokens: Annotated[float, Field(description="Mean length of a prompt.")]


class Doubling(Part):
    """What the last step of a curve over demonstrations or training rows brought, on the same items."""

    before: Annotated[int, Field(description="Demonstrations or rows; at most half as many as after.")]
    after: int
    difference: Annotated[float, Field(description="Of one doubling: the step may be more than one, or not quite one.")]
    interval: Annotated[Interval, Field(description="Of that, 95%.")]


class ShotCurve(Part):
    """One kind of demonstrations: the score over how many there are."""

    name: Annotated[str, Field(description="static, or retrieved and by what; of several draws each k's best.")]
    points: Annotated[list[ShotPoint], Field(min_length=2, description="By k, zero-shot (k = 0) first.")]
    best: Annotated[int, Field(description="The k with the highest score; of equal ones the smallest.")]
    enough: Annotated[
        int, Field(description="k*: the smallest k whose score is less than the margin below the best's, paired.")
    ]
    tokens_per_example: Annotated[float, Field(description="What a demonstration adds to a prompt, on the average.")]
    most: Annotated[int, Field(description="k_max: demonstrations that fit beside nearly all queries and answers.")]
    last: Annotated[Doubling | None, Field(description="None: only one k was tried.")]
    rising: Annotated[
        Answer,
        Field(description="Of the last doubling: yes, its interval is above 0; no, not above the margin; or unclear."),
    ]

    @property
    def room(self) -> bool:
        """True if twice as many demonstrations as were tried would fit."""
        return 2 * self.points[-1].shots <= self.most


class ContextBudget(Part):
    """Signal (a): do the demonstrations that the task needs fit a prompt?"""

    items: Annotated[int, Field(description="Dev items of the curves: those that every prompting arm answered.")]
    context: Annotated[int, Field(description="Of the base, in tokens.")]
    query_p99: Annotated[
        int, Field(description="99th percentile of the dev prompts without demonstrations, in tokens.")
    ]
    output_p99: Annotated[int, Field(description="99th percentile of the training answers, in tokens.")]
    curves: list[ShotCurve]


# Specificity


class Fertility(Part):
    """Tokens per word of the domain's outputs, and of text that the base writes by itself."""

    domain: float
    generic: Annotated[float | None, Field(description="None: there is no text to compare with.")]
    ratio: float | None
    interval: Annotated[Interval | None, Field(description="Of the ratio: 95%, bootstrap over clusters and samples.")]
    samples: Annotated[int, Field(description="Answers of the base that were counted.")]


class Surprise(Part):
    """How hard the base finds the gold answers after a prompt: bits per byte of UTF-8, the end token included."""

    arm: str
    shots: int
    items: int
    bits_per_byte: float
    interval: Interval


class Format(Part):
    """How many zero-shot answers have the form that a metric of the config asks for."""

    what: Annotated[str, Field(description="The form.")]
    items: int
    valid: int
    constrained: Annotated[
        int | None,
        Field(description="The same, held to evaluate.structured_outputs; None: not measured on all of dev."),
    ] = None


class Specificity(Part):
    """Signal (b): how far vocabulary and format are from what the base writes by itself. Evidence; decides nothing."""

    fertility: Fertility
    surprise: list[Surprise]
    format: Format | None


# Break-even


class Call(Part):
    """An average call of one arm."""

    arm: str
    input_tokens: float
    cached_tokens: Annotated[
        float, Field(description="Of these, what all prompts begin with: a prefix cache holds it.")
    ]
    output_tokens: Annotated[float, Field(description="The end token included.")]
    cost: Annotated[float, Field(description="In the unit of `BreakEven`.")]


class Speed(Part):
    """Tokens per second measured on this machine, of a batch."""

    prefill: float
    decode: float
    rows: int


class OneOffCost(Part):
    """What fine-tuning costs beside the calls, in the unit of `BreakEven`."""

    training: float
    evaluation: float
    labelling: float
    hosting: Annotated[float, Field(description="Of all the months.")]

    @property
    def total(self) -> float:
        """The sum."""
        return self.training + self.evaluation + self.labelling + self.hosting


class BreakEven(Part):
    """Signal (c): from how many calls on does a fine-tune, with its shorter prompts, pay?"""

    unit: Literal["money", "machine hours"]
    prompting: Call
    tuned: Call
    speed: Annotated[dict[str, Speed], Field(description="Arm to speed, where no token prices are given.")]
    saving: Annotated[float, Field(description="Of a call: prompting less tuned.")]
    saving_interval: Annotated[Interval, Field(description="95%, bootstrap over the clusters' token counts.")]
    once: OneOffCost
    calls: Annotated[float | None, Field(description="V*: once / saving. None: never.")]
    calls_low: Annotated[float | None, Field(description="95% interval; None: never.")]
    calls_high: Annotated[float | None, Field(description="None: never.")]
    calls_per_month: float | None
    months: int

    @property
    def expected_calls(self) -> float | None:
        """Calls in all the months; None where nobody said how many there are."""
        return None if self.calls_per_month is None else self.calls_per_month * self.months

    @property
    def pays(self) -> Answer:
        """True if the expected calls are above the whole interval of V* (yes), below it (no), or neither is known."""
        if self.calls_low is None:
            return "no"
        if self.expected_calls is None:
            return "unclear"
        if self.expected_calls < self.calls_low:
            return "no"
        return "yes" if self.calls_high is not None and self.expected_calls >= self.calls_high else "unclear"


# Gain


class PilotPart(Part):
    """An adapter that was trained on a part of the training rows."""

    rows: int
    score: ArmScore
    adapter: Annotated[str, Field(description="Its digest.")]
    seconds: Annotated[float, Field(description="Of its training.")]


class TuningGain(Part):
    """Signal (d): a pilot adapter against the best prompting arm, on the same dev items."""

    parts: Annotated[list[PilotPart], Field(min_length=1, description="Nested; the last one is the pilot.")]
    all_rows: Annotated[int, Field(description="Training rows of the domain.")]
    contrast: Annotated[Contrast, Field(description="The pilot against the best prompting arm.")]
    slope: Annotated[
        Doubling | None,
        Field(description="From the smaller part to the pilot, as of one doubling; None: there was no smaller part."),
    ]

    @property
    def pilot(self) -> PilotPart:
        """The adapter that is compared."""
        return self.parts[-1]


class Signals(Part):
    """All that was measured; ``advice/ID.json``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    id: Annotated[str, Field(description="12 hex digits: a digest of all that decides the measurement.")]
    project: str
    metric: Annotated[MetricName, Field(description="The config's first: the one that decides.")]
    margin: float
    items: Annotated[int, Field(description="Dev items.")]
    clusters: Annotated[int, Field(description="Independent groups among them.")]
    pairs: Annotated[int, Field(description="Pairs of the domain, of all splits.")]
    prompting: Annotated[Advice, Field(description="The prompting arms on dev, and which is best.")]
    cheapest: Annotated[
        str,
        Field(description="The arm with the fewest prompt tokens that is less than the margin below the best, paired."),
    ]
    context: ContextBudget
    specificity: Specificity
    break_even: BreakEven | None
    gain: TuningGain | None
    left_out: Annotated[dict[str, str], Field(description="Signal to why it was not measured.")]
    lineage: dict[str, Any]


def load_signals(file: Path) -> Signals:
    """Read ``advice/ID.json``.

    Raises:
        UserError: no such file, or none of this schema.
    """
    try:
        return Signals.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = " ".join(str(error).splitlines()[:3])
        fix = "Remove it; `tunewright advise` measures it again."
        raise UserError(f"not advice of schema {SCHEMA_VERSION}: {first}", where=str(file), fix=fix) from None


def find_advice(folder: Path, name: str | Path) -> Path:
    """Return a stored advice's file, by its ID or path.

    Args:
        folder: the project's advice.
        name: an ID, or a file.

    Raises:
        UserError: there is none.
    """
    place = next((p for p in (Path(name), folder / f"{name}.json") if p.is_file()), None)
    if place is None:
        known = sorted(file.stem for file in folder.glob("[!.]*.json"))
        there = f"There are: {', '.join(known)}." if known else "`tunewright advise` writes it."
        raise UserError(f"no advice {str(name)!r}", where=str(folder), fix=there)
    return place


def fitting_advice(folder: Path, evidence: Evidence) -> Signals | None:
    """The newest advice on an evaluation's data and base, by its metric; one with a break-even before one without.

    Args:
        folder: the project's advice.
        evidence: the evaluation's.

    Raises:
        UserError: advice that cannot be read.
    """
    found = []
    for file in sorted(folder.glob("[!.]*.json")):
        signals = load_signals(file)
        same = all(signals.lineage.get(key) == evidence.lineage.get(key) for key in ("dataset", "base"))
        if same and signals.metric == evidence.metric:
            found.append(signals)
    newest_last = sorted(found, key=lambda s: (s.break_even is not None, str(s.lineage.get("created", ""))))
    return newest_last[-1] if newest_last else None
