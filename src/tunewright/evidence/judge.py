"""The evidence's section ``judge``: a judge's findings, or only the reason of its veto."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tunewright.evidence.common import Interval, Part, Score

ControlName = Literal[
    "gold is correct", "swapped reference", "injected verdict", "gold against gold", "gold against other"
]


class Control(Part):
    """A test of the judge on cases whose answer is known by construction."""

    name: ControlName
    expected: Annotated[str, Field(description="The verdict of a reliable judge.")]
    items: Annotated[int, Field(description="Items asked about, each from a different cluster.")]
    passed: int
    unscored: Annotated[
        dict[str, int], Field(description="Reason to number of items without a verdict, which count as not passed.")
    ]
    limit: Annotated[float, Field(description="Lower 95% limit of the share passed (Clopper-Pearson, one-sided).")]
    required: Annotated[float, Field(description="The value that the limit must reach.")]

    @property
    def held(self) -> bool:
        """True if the judge passes this control."""
        return self.limit >= self.required


class JudgedArm(Part):
    """One arm's correctness by the judge, against the reference."""

    name: str
    items: Annotated[int, Field(description="Items with a verdict.")]
    correct: int
    exact: Annotated[int, Field(description="Correct answers that equal the reference and were not asked about.")]
    share: Score
    unscored: Annotated[dict[str, int], Field(description="Reason to number of items without a verdict.")]


class JudgedContrast(Part):
    """Difference of two arms' correctness, on the items with a verdict for both: ``treatment`` minus ``control``."""

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
    """Wins plus half the ties, as a share of the pairs with a verdict."""

    wins: int
    ties: int
    losses: int
    value: float
    interval: Interval
    method: str


class LengthControlled(Part):
    """The estimated win rate at equal lengths, by a logistic regression on this evaluation's pairs."""

    value: float
    interval: Interval
    slope: Annotated[
        float, Field(description="Log odds of a win, from equal length (0) to much longer (1); 0: no effect.")
    ]
    matched: Annotated[int, Field(description="Pairs whose lengths differ by at most a tenth of the longer one.")]
    method: str


class Preference(Part):
    """The judge's preference between two arms' answers, asked in both orders."""

    treatment: str
    opponent: str
    pairs: Annotated[int, Field(description="Pairs with a verdict in both orders, or equal answers.")]
    equal: Annotated[int, Field(description="Pairs of equal answers: ties, not asked about.")]
    flips: Annotated[int, Field(description="Pairs whose verdict changed with the order; each counts as a tie.")]
    flip_rate: Annotated[
        float | None, Field(description="Flips as a share of the pairs asked about; null: none was asked.")
    ]
    rate: WinRate
    p_value: float
    test: str
    stripped: Annotated[
        WinRate | None, Field(description="The same with Markdown removed from all texts; null: no text has any.")
    ]
    stripped_texts: Annotated[int, Field(description="Pairs with Markdown in at least one text.")]
    length_controlled: LengthControlled | None
    length_note: Annotated[str | None, Field(description="Reason why there is no length-controlled rate.")]
    unscored: Annotated[dict[str, int], Field(description="Reason to number of pairs without a verdict.")]


class JudgeUsage(Part):
    """Cost of the replies, including earlier, stopped runs of the same judgement."""

    calls: Annotated[int, Field(description="Number of replies; a repeated question is asked once.")]
    prompt_tokens: int
    completion_tokens: int
    estimated: Annotated[int, Field(description="Replies without token counts, estimated at 4 characters per token.")]
    cost: Annotated[float | None, Field(description="Cost in the prices' currency; null: no prices given.")]


class Judgement(Part):
    """A judge's findings; a vetoed judge has only its controls."""

    model: str
    url: str
    parameters: dict[str, Any]
    prompts: Annotated[str, Field(description="SHA-256 of the judge's instructions, criteria included.")]
    criteria: str | None
    created: Annotated[str, Field(description="UTC, ISO 8601.")]
    same_family: Annotated[
        str | None, Field(description="The family that the judge's and the base's names share, such as llama.")
    ]
    reference_model: Annotated[str | None, Field(description="The reference model, or the file of its answers.")]
    controls: tuple[Control, ...]
    vetoed: Annotated[
        tuple[str, ...], Field(description="The failed controls, in words; empty: the judge is accepted.")
    ]
    arms: tuple[JudgedArm, ...] = ()
    contrast: JudgedContrast | None = None
    preferences: tuple[Preference, ...] = ()
    spent: JudgeUsage
    reference_spent: Annotated[
        JudgeUsage | None, Field(description="Cost of the reference model's answers; null: it is not an endpoint.")
    ] = None
    replaced: Annotated[
        tuple[str, ...],
        Field(description="Earlier judgements of this evaluation that this one replaced: model, time, and if vetoed."),
    ] = ()

    @model_validator(mode="after")
    def _vetoed_says_nothing(self) -> Judgement:
        if self.vetoed and (self.arms or self.contrast or self.preferences):
            raise ValueError("a vetoed judge must have no findings")
        return self
