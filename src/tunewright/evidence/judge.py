"""The evidence's section ``judge``: what a judge found, or only why it may not be heard."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tunewright.evidence.base import Interval, Part, Score

ControlName = Literal[
    "gold is correct", "swapped reference", "injected verdict", "gold against gold", "gold against other"
]


class Control(Part):
    """What the judge makes of cases whose answer is known by construction."""

    name: ControlName
    expected: Annotated[str, Field(description="What a sound judge says.")]
    items: Annotated[int, Field(description="Items asked about, each of another cluster.")]
    passed: int
    unscored: Annotated[
        dict[str, int], Field(description="Reason to number of items without a verdict; they count as not passed.")
    ]
    limit: Annotated[float, Field(description="Lower 95% limit of the share passed (Clopper-Pearson, one-sided).")]
    required: Annotated[float, Field(description="What the limit has to reach.")]

    @property
    def held(self) -> bool:
        """True if the judge passes this control."""
        return self.limit >= self.required


class JudgedArm(Part):
    """One arm's correctness by the judge, against the reference."""

    name: str
    items: Annotated[int, Field(description="Items with a verdict.")]
    correct: int
    exact: Annotated[int, Field(description="Of the correct ones, those equal to the reference: not asked about.")]
    share: Score
    unscored: Annotated[dict[str, int], Field(description="Reason to number of items without a verdict.")]


class JudgedContrast(Part):
    """Two arms' correctness on the items on which both have a verdict: ``treatment`` minus ``control``."""

    treatment: str
    control: str
    items: int
    difference: float
    interval: Interval
    interval_method: str
    p_value: float
    test: str
    fixed: Annotated[int, Field(description="Items correct under treatment and incorrect under control.")]
    broken: Annotated[int, Field(description="Items incorrect under treatment and correct under control.")]
    effective_items: float
    minimum_detectable_effect: Annotated[float, Field(description="With 80% power; a share.")]


class WinRate(Part):
    """Wins plus half the ties, by the pairs with a verdict."""

    wins: int
    ties: int
    losses: int
    value: float
    interval: Interval
    method: str


class LengthControlled(Part):
    """The win rate that answers of equal length would have, by a logistic regression on our own pairs."""

    value: float
    interval: Interval
    slope: Annotated[float, Field(description="Log odds of a win from as long (0) to much longer (1); 0: no effect.")]
    matched: Annotated[int, Field(description="Pairs whose lengths differ by at most a tenth of the longer one.")]
    method: str


class Preference(Part):
    """Which of two arms' answers the judge prefers, asked in both orders."""

    treatment: str
    opponent: str
    pairs: Annotated[int, Field(description="Pairs with a verdict in both orders, or equal answers.")]
    equal: Annotated[int, Field(description="Pairs of equal answers: ties that were not asked about.")]
    flips: Annotated[int, Field(description="Pairs whose verdict changed with the order; each counts as a tie.")]
    flip_rate: Annotated[float | None, Field(description="Flips by the pairs asked about; null: none was.")]
    rate: WinRate
    p_value: float
    test: str
    stripped: Annotated[
        WinRate | None, Field(description="The same without markdown in any text; null: no text has any.")
    ]
    stripped_texts: Annotated[int, Field(description="Pairs in which some text has markdown.")]
    length_controlled: LengthControlled | None
    length_note: Annotated[str | None, Field(description="Why there is no length-controlled rate.")]
    unscored: Annotated[dict[str, int], Field(description="Reason to number of pairs without a verdict.")]


class Spent(Part):
    """What the replies cost, those of earlier, stopped runs of the same judgement included."""

    calls: Annotated[int, Field(description="Replies; a question that comes twice is asked once.")]
    prompt_tokens: int
    completion_tokens: int
    estimated: Annotated[int, Field(description="Replies without token counts: taken as 4 characters a token.")]
    cost: Annotated[float | None, Field(description="In the prices' currency; null: no prices given.")]


class Judgement(Part):
    """A judge's findings; of a vetoed judge its controls and nothing else."""

    model: str
    url: str
    parameters: dict[str, Any]
    prompts: Annotated[str, Field(description="SHA-256 of the judge's instructions, criteria included.")]
    criteria: str | None
    created: Annotated[str, Field(description="UTC, ISO 8601.")]
    same_family: Annotated[
        str | None, Field(description="The family that the judge's and the base's names share, such as llama.")
    ]
    reference_model: Annotated[str | None, Field(description="The other model, or the file of its answers.")]
    controls: tuple[Control, ...]
    vetoed: Annotated[tuple[str, ...], Field(description="Which controls failed, in words; empty: the judge is heard.")]
    arms: tuple[JudgedArm, ...] = ()
    contrast: JudgedContrast | None = None
    preferences: tuple[Preference, ...] = ()
    spent: Spent
    reference_spent: Annotated[
        Spent | None, Field(description="On the reference model's answers; null: it is no endpoint.")
    ] = None
    replaced: Annotated[
        tuple[str, ...],
        Field(description="Judgements of this evaluation that this one took the place of: model, when, and if vetoed."),
    ] = ()

    @model_validator(mode="after")
    def _vetoed_says_nothing(self) -> Judgement:
        if self.vetoed and (self.arms or self.contrast or self.preferences):
            raise ValueError("a vetoed judge's findings are no evidence")
        return self
