"""Building blocks of the evidence's sections, and its small sections."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tunewright.config import MetricName
from tunewright.metrics import p_text, points_text, score_text
from tunewright.render.blocks import Bar, Tone

Outcome = Literal["better", "not worse", "worse", "can't tell"]
"""A comparison at one look of a confidence sequence."""


class Part(BaseModel):
    """A part of the evidence: frozen, with finite numbers and no extra keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Interval(Part):
    """A 95% interval in the metric's own unit (shares from 0 to 1)."""

    low: float
    high: float

    @property
    def percents(self) -> str:
        """The ends in hundredths: ``51.0 to 73.2``."""
        return f"{100 * self.low:.1f} to {100 * self.high:.1f}"

    @property
    def points(self) -> str:
        """The ends of a difference, in points: ``-1.2 to +3.4``."""
        return f"{points_text(self.low)} to {points_text(self.high)}"


class Contrast(Part):
    """Difference of two arms on the same items: ``treatment`` minus ``control``."""

    treatment: str
    control: str
    metric: MetricName
    scored: Annotated[int, Field(description="Items scored in both arms, which the contrast covers.")]
    left_out: Annotated[dict[str, int], Field(description="Reason to number of unscored items.")]
    clusters: Annotated[int, Field(description="Independent clusters among the scored items.")]
    difference: float
    interval: Interval
    interval_method: str
    p_value: Annotated[float, Field(description="Two-sided p-value for no difference.")]
    p_adjusted: Annotated[
        float | None,
        Field(description="Holm-adjusted over the contrasts by the deciding metric; null for the other metrics."),
    ]
    test: Annotated[str, Field(description="The test that gave p_value, e.g. 'exact McNemar'.")]
    fixed: Annotated[int, Field(description="Items that score higher under treatment: right only there, or better.")]
    broken: Annotated[int, Field(description="Items that score lower under treatment: wrong only there, or worse.")]
    effective_items: Annotated[
        float | None,
        Field(description="Effective number of independent items (null for a corpus metric)."),
    ] = None
    minimum_detectable_effect: Annotated[
        float, Field(description="Smallest true difference that this number of items detects with 80% power.")
    ]


def percent_bar(
    label: str, value: float, interval: Interval, text: str, tone: Tone = "tuned", margin: float | None = None
) -> Bar:
    """Return a figure's row for a share or a difference of shares, in hundredths."""
    scaled = None if margin is None else 100 * margin
    return Bar(label, 100 * value, 100 * interval.low, 100 * interval.high, text, tone, scaled)


class Score(Part):
    """A value with its interval, as a share from 0 to 1 (a corpus BLEU of 43.2 is 0.432)."""

    value: float
    interval: Interval
    method: Annotated[str, Field(description="Method of the interval, e.g. 'Wilson'.")]

    @property
    def text(self) -> str:
        """The share with its interval: ``62.5% (51.0 to 73.2)``."""
        return f"{100 * self.value:.1f}% ({self.interval.percents})"


class References(Part):
    """Counts of references, for inputs that occur in several rows with different outputs."""

    items: int
    inputs: Annotated[int, Field(description="Distinct inputs, ignoring case and white space.")]
    several: Annotated[int, Field(description="Inputs with more than one reference.")]
    references: Annotated[int, Field(description="Distinct outputs, summed over inputs.")]

    @property
    def text(self) -> str:
        """Text such as ``5 distinct inputs with 6.0 references each``, to follow ``30 test items``."""
        inputs = f"{self.inputs:,} distinct input{'' if self.inputs == 1 else 's'}"
        if self.several == self.inputs:
            return f"{inputs} with {self.references / self.inputs:.1f} references each"
        return f"{inputs} with {self.references / self.inputs:.1f} references on average"


class ArmScore(Score):
    """One arm's score by one metric, with the number of scored items."""

    scored: Annotated[int, Field(description="Items that were scored.")]
    unscored: Annotated[dict[str, int], Field(description="Reason to number of unscored items.")]
    outside: Annotated[
        int, Field(description="Answers outside the declared choices, counted as wrong; 0 with other metrics.")
    ] = 0


class NoiseFloor(Part):
    """Differences between two runs of the base on the same items in different batches.

    In low precision the batch affects the order of additions, and so which of two nearly tied tokens wins (Yuan et al.
    2025, arXiv 2506.09501). A difference between arms that is not larger than this noise shows nothing.
    """

    items: Annotated[int, Field(description="Test items with distinct prompts, sampled by the seed.")]
    changed: Annotated[int, Field(description="Items whose second answer differs from the first.")]
    score_difference: Annotated[float, Field(description="Second score minus the first, by the deciding metric.")]
    how: Annotated[str, Field(description="The difference between the two runs.")]


class EngineUsed(Part):
    """The engine of all arms and of the noise floor, recorded because engines round differently."""

    name: Annotated[Literal["peft", "vllm"], Field(description="peft: the built-in loop over transformers and peft.")]
    version: Annotated[str, Field(description="Version of the package with the engine's name.")]
    packages: Annotated[dict[str, str], Field(description="Versions in the engine's environment that affect numbers.")]
    device: Annotated[str, Field(description="cpu or cuda.")]
    dtype: str
    rows: Annotated[int, Field(description="Maximum number of answers decoded at once.")]
    why: Annotated[str, Field(description="Reason for this engine: evaluate.engine, and the engines installed.")]

    @property
    def text(self) -> str:
        """Name, version, device and precision, for display."""
        return f"{self.name} {self.version} ({self.device}, {self.dtype})"


RULE = (
    "left out first: the adapter with demonstrations, an optimized prompt or a grammar, which decides nothing; then "
    "the prompting arms with the most demonstrations, of equal numbers static before retrieved and the later before "
    "the earlier; last, other instructions and grammars zero-shot. Never left out: zero-shot, the retrieved arm with "
    "the fewest demonstrations, tuned, any item, and arms that would save no time, since their answers are all there"
)


class Budget(Part):
    """Arms that ``--minutes`` left out."""

    minutes: Annotated[float, Field(description="The value of --minutes.")]
    expected: Annotated[float, Field(description="Estimated minutes of the remaining arms, from the measured speed.")]
    left_out: Annotated[tuple[str, ...], Field(description="Arms left out, in this order.")]
    rule: Annotated[str, Field(description="The rule that orders the arms to leave out, in words.")] = RULE

    @property
    def prompting(self) -> tuple[str, ...]:
        """The prompting arms left out, which weakens the baseline."""
        return tuple(name for name in self.left_out if not name.startswith("tuned"))

    @property
    def why(self) -> str:
        """The reason for one arm, phrased to follow the arm's name."""
        return f"--minutes {self.minutes:g} has no time for it"

    @property
    def caution(self) -> str | None:
        """The caution that a verdict must carry; None if no prompting arm was left out."""
        if not self.prompting:
            return None
        return (
            f"Prompting was not tried as hard as usual: --minutes {self.minutes:g} left out {len(self.prompting)} "
            f"prompting arms ({', '.join(self.prompting)}). The best prompt may be better than the one compared here."
        )


class BandScore(Score):
    """One arm's score on the items of a band, by the deciding metric."""

    scored: Annotated[int, Field(description="Items of the band that are scored for this arm.")]


class Subset(Part):
    """A subset of the items, with each arm's score on it."""

    items: int
    clusters: int
    scores: Annotated[
        dict[str, BandScore], Field(description="Scores by arm, without arms that have no scored item here.")
    ]
    difference: Annotated[
        float | None,
        Field(description="Difference of the deciding contrast on these items; null: none is scored in both arms."),
    ] = None
    interval: Annotated[
        Interval | None, Field(description="95% interval of the difference, not adjusted for the number of bands.")
    ] = None


class Band(Subset):
    """Items by similarity to their nearest training input: from low up to but excluding high; the last band includes 1.

    The farther half includes its high.
    """

    low: float
    high: float


class TrainSimilarity(Part):
    """Similarity of the items to the training rows, and each arm's score by it."""

    similarity: Annotated[str, Field(description="The compared texts, and the similarity measure.")]
    treatment: str
    control: str
    farther: Annotated[
        Band,
        Field(
            description="The farther half of the items: up to and including the median similarity, which is its high."
        ),
    ]
    bands: Annotated[tuple[Band, ...], Field(description="Bands that contain items, the farthest first.")]


class OutputTemplates(Part):
    """Scores on items whose output template (quoted strings and numbers masked) is known from training, or new."""

    treatment: str
    control: str
    seen: Annotated[
        Subset | None,
        Field(description="Items with a template that training rows have; null: there are no such items."),
    ]
    new: Annotated[
        Subset | None,
        Field(description="Items with a template that no training row has; null: there are no such items."),
    ]


class GeneratedEffect(Part):
    """Two adapters of one dataset version, of which one was trained without the generated rows, on people's test items.

    The comparison is not a declared one: it decides nothing, and its p-value is not adjusted.
    """

    generated: Annotated[int, Field(description="Generated rows that the first adapter was trained on.")]
    accepted: Annotated[int, Field(description="Those that a person had accepted when this was measured.")]
    people: Annotated[int, Field(description="Training rows of people, which both adapters were trained on.")]
    without: Annotated[str, Field(description="Evaluation of the adapter trained without the generated rows.")]
    adapter: Annotated[str, Field(description="Name of that adapter.")]
    metric: MetricName
    items: Annotated[int, Field(description="Test items of people, scored in both.")]
    score_with: ArmScore
    score_without: ArmScore
    difference: Annotated[float, Field(description="Score with the generated rows minus the score without them.")]
    interval: Interval
    interval_method: str
    p_value: float
    test: str

    @property
    def line(self) -> str:
        """The finding in one sentence."""
        ours, theirs = (score_text(self.metric, each.value) for each in (self.score_with, self.score_without))
        return (
            f"{self.generated:,} of {self.generated + self.people:,} training rows are generated ({self.accepted:,} "
            f"accepted by people). With them the adapter scores {ours}, and {theirs} without them, on {self.items:,} "
            f"test items of people: {points_text(self.difference)} points, 95% interval {self.interval.points}, "
            f"{p_text(self.p_value)} ({self.test}; not a declared contrast)."
        )


class StoredPrompt(Part):
    """An arm's prompt for one item."""

    messages: Annotated[tuple[int, ...], Field(description="Numbers of its messages: lines of prompts.jsonl, from 1.")]
    tokens: Annotated[
        str | None, Field(description="Digest of its token ids; null: a hosted model, whose provider makes the tokens.")
    ] = None
    demonstrations: Annotated[
        tuple[str, ...], Field(description="Pair keys of the demonstrations, in the prompt's order.")
    ] = ()
    dropped: Annotated[bool, Field(description="Demonstrations were left out to fit the context.")] = False
    plan: Annotated[str | None, Field(description="The item's own arm where the folds differ; null: the arm.")] = None


# The format that all references share, and the answers that follow it


ENOUGH = 0.95
"""Share of the references that must have a format, so that it counts as the task's format."""
_MOST_MASKS = 12
_FEWEST = 20
"""References needed to infer a format."""

Check = Callable[[str], bool]


class AnswerFormat(Part):
    """Counts of answers in the references' format."""

    what: Annotated[str, Field(description="The form, in words, such as: JSON with the fields name, date.")]
    items: int
    references: Annotated[int, Field(description="References of these items that have the form.")]
    answers: Annotated[dict[str, int], Field(description="Arm name to how many of its answers have the form.")]
    longer: Annotated[int, Field(description="References with more tokens than an answer may have.")] = 0


def answer_form(
    outputs: Sequence[str], references: Sequence[str], answers: Mapping[str, Sequence[str]], longer: int
) -> AnswerFormat | None:
    """Return the format of a task's outputs and how many answers follow it; None with too few outputs.

    The format is the first of these that 95% of the outputs have: JSON with the fields common to all; a label, if
    outputs are class-like; one of a dozen patterns of letters, digits and punctuation; a range of length and lines.
    ``answers`` are by arm; ``longer`` counts references with more tokens than an answer may have.
    """
    if len(outputs) < _FEWEST:
        return None
    forms = (found for form in (_json, _label, _pattern) if (found := form(outputs)) is not None)
    shared = (found for found in forms if sum(map(found[1], outputs)) >= ENOUGH * len(outputs))
    what, check = next(shared, None) or _length(outputs)
    return AnswerFormat(
        what=what,
        items=len(references),
        references=sum(map(check, references)),
        answers={name: sum(map(check, given)) for name, given in answers.items()},
        longer=longer,
    )


def _object(text: str) -> Any:
    """Return the JSON object or array in a text, or None."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict | list) else None


def _json(outputs: Sequence[str]) -> tuple[str, Check] | None:
    values = [value for text in outputs if (value := _object(text)) is not None]
    if not values:
        return None
    objects = [value for value in values if isinstance(value, dict)]
    fields = Counter(key for value in objects for key in value)
    common = [key for key, count in fields.items() if count >= ENOUGH * len(outputs)]
    if not common:
        return "JSON", lambda text: _object(text) is not None
    return (
        f"JSON with the {'field' if len(common) == 1 else 'fields'} {', '.join(common)}",
        lambda text: isinstance(value := _object(text), dict) and all(key in value for key in common),
    )


def _label(outputs: Sequence[str]) -> tuple[str, Check] | None:
    from tunewright.data.examples import class_like

    stripped = [text.strip() for text in outputs]
    if not class_like(stripped):
        return None
    labels = set(stripped)
    return f"one of the {len(labels)} labels", lambda text: text.strip() in labels


def _mask(text: str) -> str:
    """Return a text with letters and digits masked and runs of them as one: ``2024-07-01`` is ``9-9-9``."""
    letters = re.sub(r"[^\W\d_]+", "a", text.strip())
    return re.sub(r"\d+", "9", letters)


def _pattern(outputs: Sequence[str]) -> tuple[str, Check] | None:
    masks = {mask for mask, _ in Counter(map(_mask, outputs)).most_common(_MOST_MASKS)}
    # Words without punctuation match any text.
    if all(re.fullmatch(r"a( a)*", mask) for mask in masks):
        return None
    example = Counter(map(_mask, outputs)).most_common(1)[0][0]
    sample = next(text.strip() for text in outputs if _mask(text) == example)
    return f"letters, digits and marks as in {sample!r}", lambda text: _mask(text) in masks


def _length(outputs: Sequence[str]) -> tuple[str, Check]:
    lengths = sorted(len(text.strip()) for text in outputs)
    low, high = lengths[len(lengths) // 100] // 2, 2 * lengths[-1 - len(lengths) // 100]
    lines = max(text.strip().count("\n") + 1 for text in outputs)
    counted = "1 line of" if lines == 1 else f"at most {lines:,} lines and"
    return (
        f"{counted} {low:,} to {high:,} characters",
        lambda text: low <= len(text.strip()) <= high and text.strip().count("\n") < lines,
    )
