"""Building blocks of the evidence's sections, and its small sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from tunewright.config import MetricName
from tunewright.metrics import p_text, points_text, score_text
from tunewright.render.blocks import Bar, Tone


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
