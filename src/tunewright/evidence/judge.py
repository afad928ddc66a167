"""The evidence's section ``judge``: a judge's findings, or only the reason of its veto."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tunewright.evidence.common import Interval, Part, Score
from tunewright.evidence.power import ALPHA
from tunewright.metrics import p_text, points_text
from tunewright.render.blocks import Block, Cell, Column, Lead, Notes, Row, Section, row, table, words

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
    """The estimated win rate at equal lengths, by a logistic regression on the pairs."""

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


def judge_line(judge: Judgement) -> str:
    """Return the judge's result about the deciding arms, or the reason of its veto."""
    if judge.vetoed:
        failed = ", ".join(f"{c.name} ({c.passed} of {c.items})" for c in judge.controls if not c.held)
        return f"Judge {judge.model}: vetoed, so its judgements do not count. Failed controls: {failed}."
    if not judge.preferences:
        return f"Judge {judge.model}: passed its controls but compared no answers."
    found, correct = judge.preferences[0], judge.contrast
    rate = f"{100 * found.rate.value:.1f}% ({found.rate.interval.percents})"
    flips = "" if found.flip_rate is None else f"; {found.flip_rate:.0%} of its verdicts changed with the order"
    text = f"Judge {judge.model}: {found.treatment} wins {rate} against {found.opponent}, ties half{flips}."
    if correct is None:
        return text
    return f"{text} Correct by the reference: {points_text(correct.difference)} points ({correct.interval.points})."


def judge_objects(judge: Judgement | None, treatment: str, control: str, *, overruled: bool) -> tuple[bool, list[str]]:
    """Return whether the judge objects to the treatment, with sentences about it.

    It can object only if it passed its controls, is not of the base's family, and agrees in all its
    measurements (:func:`_objections`); people who prefer the treatment overrule it.
    """
    if judge is None:
        return False, []
    said = judge_line(judge)
    objections = _objections(judge, (treatment, control))
    if not objections:
        return False, [said]
    text = f"the judge finds {control} better, {' and '.join(objections)}"
    if judge.same_family:
        kin = f"it belongs to the base's family ({judge.same_family}) and may favour it, so the verdict ignores it"
        return False, [said, f"Caution: {text}; but {kin}. Use a judge of another family, or ask people."]
    if overruled:
        return False, [said, f"Caution: {text}; but people prefer {treatment}, who overrule the judge."]
    return True, [said, f"But {text}. `tunewright human-eval` asks people, who overrule it."]


def _objections(judge: Judgement, arms: tuple[str, str]) -> list[str]:
    """Return the respects in which the judge finds the treatment significantly worse.

    A preference counts only if it holds in every form that was measured: raw, without Markdown, and at equal length.
    Otherwise it may be about style. A vetoed judge has no findings.
    """
    found = []
    correct = judge.contrast
    worse = correct is not None and correct.interval.high < 0 and correct.p_value < ALPHA
    if correct is not None and worse and (correct.treatment, correct.control) == arms:
        found.append(f"in correctness ({p_text(correct.p_value)})")
    preference = next((each for each in judge.preferences if (each.treatment, each.opponent) == arms), None)
    if preference is not None and preference.p_value < ALPHA:
        forms = (preference.rate, preference.stripped, preference.length_controlled)
        if all(form.interval.high < 0.5 for form in forms if form is not None):
            found.append(f"in preference ({p_text(preference.p_value)})")
    return found


def judge_section(judge: Judgement) -> Section:
    """Return the judge's controls first; for a vetoed judge, no finding."""
    expected = Column("Expected verdict", words=True, detail=True)
    head = ("Control", expected, "Passed", "No verdict", "At least (95%)", "Required", *words("Result"))
    controls = table("Table of controls", head, map(_control, judge.controls))
    blocks: list[Block] = [Lead(judge_line(judge)), controls]
    if judge.arms:
        head = ("Correct, by the reference", "Correct", "Share, %", "95% interval", "Exact", "No verdict")
        blocks.append(table("Table of judged arms", head, map(_judged_arm, judge.arms)))
    if judge.preferences:
        counts = ("Wins", "Ties", "Losses", "Win rate, %", "95% interval", "Flips", "No verdict")
        rows = [row for each in judge.preferences for row in _preference(each)]
        blocks.append(table("Table of preferences", ("Preferred, in both orders", *counts), rows))
    notes = [*judge.vetoed, *_notes(judge), _spent("Spent", judge.spent)]
    if judge.reference_spent is not None:
        notes.append(_spent("On the reference model", judge.reference_spent))
    return Section("judge", "What a judge says", (*blocks, Notes(tuple(notes))))


def _control(found: Control) -> Row:
    counts = (f"{found.passed} of {found.items}", f"{sum(found.unscored.values())}")
    result = Cell("holds", tone="yes") if found.held else Cell("FAILS", tone="no")
    return row(found.name, found.expected, *counts, f"{found.limit:.0%}", f"{found.required:.0%}", result)


def _judged_arm(arm: JudgedArm) -> Row:
    share = (f"{100 * arm.share.value:.1f}", arm.share.interval.percents)
    unscored = f"{sum(arm.unscored.values())}"
    return row(arm.name, f"{arm.correct} of {arm.items}", *share, f"{arm.exact}", unscored)


def _preference(found: Preference) -> list[Row]:
    flips = "" if found.flip_rate is None else f"{found.flip_rate:.0%}"
    name = f"{found.treatment} against {found.opponent}"
    rows = [row(name, *_rate(found.rate), flips, f"{sum(found.unscored.values())}")]
    if found.stripped is not None:
        note = f"{found.stripped_texts} pairs have some"
        rows.append(row(Cell("without markdown", note), *_rate(found.stripped), "", ""))
    if found.length_controlled is not None:
        equal = found.length_controlled
        numbers = (f"{100 * equal.value:.1f}", equal.interval.percents)
        rows.append(row(Cell("at equal length", equal.method), "", "", "", *numbers, "", ""))
    return rows


def _rate(rate: WinRate) -> tuple[str, ...]:
    counts = (f"{rate.wins}", f"{rate.ties}", f"{rate.losses}")
    return (*counts, f"{100 * rate.value:.1f}", rate.interval.percents)


def _notes(judge: Judgement) -> list[str]:
    notes = []
    if (found := judge.contrast) is not None:
        notes.append(
            f"Correctness, {found.treatment} − {found.control}: {points_text(found.difference)} points on "
            f"{found.items:,} items, 95% interval {found.interval.points}, {p_text(found.p_value)} ({found.test}); "
            f"{found.fixed} fixed, {found.broken} broken."
        )
    for each in judge.preferences:
        test = f"{p_text(each.p_value)} ({each.test})"
        equal = "" if each.length_note is None else f" At equal length: {each.length_note}."
        notes.append(f"Against {each.opponent}: {test}; {each.equal} equal answers tie unasked.{equal}")
    missing = {f"{arm.name}: {why}": count for arm in judge.arms for why, count in arm.unscored.items()}
    missing |= {f"against {p.opponent}: {why}": count for p in judge.preferences for why, count in p.unscored.items()}
    notes += [f"No verdict, {why}: {count}." for why, count in missing.items()]
    if judge.same_family and not judge.vetoed:
        notes.append(
            f"The judge and the base belong to one family ({judge.same_family}): the judge may favour its own kind."
        )
    if judge.reference_model and not judge.vetoed:
        notes.append(f"The answers of {judge.reference_model} were also compared.")
    return [*notes, *(f"This judgement replaces: {each}." for each in judge.replaced)]


def _spent(title: str, spent: JudgeUsage) -> str:
    cost = "" if spent.cost is None else f", cost {spent.cost:.4f}"
    guessed = f" ({spent.estimated:,} replies came without counts: guessed)" if spent.estimated else ""
    tokens = f"{spent.prompt_tokens:,} prompt and {spent.completion_tokens:,} reply tokens"
    return f"{title}: {spent.calls:,} replies, {tokens}{guessed}{cost}."
