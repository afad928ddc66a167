"""The measured signals (schema of ``advice/ID.json``) and the decision that follows; readable without torch.

=================  ==========================================  =======================  ================
the pilot          all rows may reach                          training pays by volume  answer
=================  ==========================================  =======================  ================
beats              (any)                                       (any)                    fine-tune
is as good         (any)                                       yes                      fine-tune
(any)              at most the margin                          no, or unknown           prompt, retrieve
is not as good     at most minus the margin                    yes                      prompt, retrieve
is not as good     at most the margin, more than minus it      yes                      can't tell
does not beat      more than the margin                        (any other)              can't tell
=================  ==========================================  =======================  ================

Before the table: if neither an adapter nor the best prompt can beat the best free arm by the margin, the answer is
*no model*.

Without a pilot the gain of training is unknown, except that no score exceeds 1. With fewer than `FEWEST_CLUSTERS` dev
clusters the answer is *can't tell*. The columns are properties of :class:`Grounds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from tunewright.config import MetricName
from tunewright.core.errors import UserError
from tunewright.evidence.common import ArmScore, Interval, Part
from tunewright.evidence.power import FEWEST_CLUSTERS
from tunewright.evidence.schema import Advice, Arm, ArmKind, Contrast, Evidence, FreeArms
from tunewright.evidence.verdict import SIGNIFICANT

SCHEMA_VERSION: Literal[2] = 2

Ternary = Literal["yes", "no", "unclear"]


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
        Ternary,
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
    """Signal (a): whether the task's demonstrations fit into a prompt."""

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
    def pays(self) -> Ternary:
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

    schema_version: Literal[2] = SCHEMA_VERSION
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


def load_signals(file: Path) -> Signals:
    """Load ``advice/ID.json``."""
    try:
        return Signals.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = " ".join(str(error).splitlines()[:3])
        fix = "Remove it; `tunewright advise` measures it again."
        raise UserError(f"Not advice of schema {SCHEMA_VERSION}: {first}", where=str(file), fix=fix) from None


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


# Decision


Recommendation = Literal["fine-tune", "prompt", "retrieve", "no model", "can't tell"]

RETRIEVING: frozenset[ArmKind] = frozenset({"retrieved"})
"""Kinds of arms that look demonstrations up for each question."""

EXIT_CODES: dict[Recommendation, int] = {"fine-tune": 0, "prompt": 3, "retrieve": 3, "no model": 3, "can't tell": 4}


@dataclass(frozen=True)
class Decision:
    """A recommendation and its reason."""

    answer: Recommendation
    arm: str | None
    """The arm to use, if the answer names one."""
    why: str
    """The reason, in a sentence."""

    @property
    def exit_code(self) -> int:
        """0: fine-tune, 3: prompt, retrieve or no model, 4: can't tell."""
        return EXIT_CODES[self.answer]


@dataclass(frozen=True)
class Grounds:
    """Conclusions from the signals, one per property."""

    signals: Signals

    @property
    def clusters(self) -> int:
        """Independent clusters among the dev items (with a pilot: the clusters scored in both arms)."""
        gain = self.signals.gain
        return self.signals.clusters if gain is None else gain.contrast.clusters

    @property
    def enough_clusters(self) -> bool:
        """True if any difference could be significant."""
        return self.clusters >= FEWEST_CLUSTERS

    @cached_property
    def best(self) -> Arm:
        """The best prompting arm."""
        prompting = self.signals.prompting
        return next(a for a in prompting.arms if a.name == prompting.best)

    @cached_property
    def headroom(self) -> float:
        """The gain that twice the demonstrations may add to the best prompting score, as a share.

        It is the gain of the last doubling, since gains diminish; 0 if twice as many do not fit, or if the last
        doubling gained no more than the margin.
        """
        return max([0.0, *(self.lead(curve) + last_gain(curve) for curve in self.signals.context.curves)])

    def lead(self, curve: ShotCurve) -> float:
        """Return the score of a curve's most demonstrations minus the best score of all curves, on the same items.

        It is 0 if that is the best score, else negative.
        """
        tops = [p.score.value for c in self.signals.context.curves for p in c.points]
        return curve.points[-1].score.value - max(tops)

    @property
    def beats(self) -> bool:
        """True if the pilot is better by more than the margin and the headroom, and the test is significant."""
        gain = self.signals.gain
        if gain is None or not self.enough_clusters:
            return False
        above = gain.contrast.interval.low > self.signals.margin + self.headroom
        return above and gain.contrast.p_value < SIGNIFICANT

    @property
    def as_good(self) -> bool:
        """True if the pilot is shown to be less than the margin below the best prompting arm."""
        gain = self.signals.gain
        return gain is not None and self.enough_clusters and gain.contrast.interval.low > -self.signals.margin

    @property
    def reach(self) -> float:
        """The largest gain that an adapter of all rows may have.

        It is the upper end of the pilot's interval, plus the upper end of the last doubling's gain for each doubling to
        all rows. It is capped at the distance to a score of 1. Without a smaller part it is infinite.
        """
        gain = self.signals.gain
        return self._most(self.best, math.inf if gain is None else gain.contrast.interval.high)

    def _most(self, arm: Arm, pilot: float) -> float:
        """Return the largest gain over an arm; ``pilot`` is the upper end of the pilot's (infinite: not measured)."""
        ceiling, gain = 1 - arm.score(self.signals.metric).interval.low, self.signals.gain
        ahead = 0.0
        if gain is not None and (left := doublings_left(gain)):
            ahead = math.inf if gain.slope is None else left * max(gain.slope.interval.high, 0.0)
        return min(ceiling, pilot + ahead)

    @property
    def free(self) -> FreeArms | None:
        """The free arms, if the best prompt does not beat the best of them by the margin."""
        free = self.signals.prompting.free
        return None if free is None or free.prompting is None or free.prompting.outcome != "replace" else free

    @property
    def free_enough(self) -> str | None:
        """The best free arm, if neither an adapter of these rows nor the best prompt beats it by the margin."""
        if self.free is None:
            return None
        tuned = self.free.tuned
        most = self._most(self.free.best_on_dev, math.inf if tuned is None else tuned.interval.high)
        return self.free.best if most < self.signals.margin else None

    @property
    def no_gain(self) -> bool:
        """True if no adapter of these rows can gain more than the margin."""
        return self.enough_clusters and self.reach <= self.signals.margin

    @property
    def pays(self) -> Literal["yes", "no", "unclear"]:
        """Answer to *do cheaper calls pay for training?*"""
        even = self.signals.break_even
        return "unclear" if even is None else even.pays


def last_gain(curve: ShotCurve) -> float:
    """Return the gain of the last doubling of demonstrations; 0 if the next one does not fit or the curve is flat."""
    return 0.0 if curve.last is None or not curve.room or curve.rising == "no" else curve.last.difference


def doublings_left(gain: TuningGain) -> float:
    """Return the number of doublings from the pilot's rows to all rows."""
    return math.log2(gain.all_rows / gain.pilot.rows)


def decide(signals: Signals) -> Decision:
    """Return the recommendation by the table above."""
    grounds = Grounds(signals)
    best, margin = signals.prompting.best, f"{100 * signals.margin:g} points"
    if not grounds.enough_clusters:
        return Decision(
            "can't tell",
            None,
            f"{grounds.clusters} independent dev clusters are too few (at least {FEWEST_CLUSTERS} are needed).",
        )
    if grounds.free_enough is not None:
        why = f"No model is needed: neither {best} nor an adapter of these rows can beat {grounds.free_enough} by "
        return Decision("no model", grounds.free_enough, f"{why}the margin of {margin}.")
    if grounds.beats:
        beyond = ", even if twice the demonstrations gained as much again" if grounds.headroom > 0 else ""
        return Decision("fine-tune", None, f"The pilot beats {best} by more than the margin of {margin}{beyond}.")
    if grounds.as_good and grounds.pays == "yes":
        return Decision("fine-tune", None, f"The pilot is as good as {best}, and its shorter prompts pay for it.")
    if grounds.no_gain:
        return _without_gain(signals, grounds)
    why = _unsettled(signals)
    if grounds.free is not None:
        why += f" Until then, {grounds.free.best} is not worse than {best} and needs no model."
    return Decision("can't tell", None, why)


def _without_gain(signals: Signals, grounds: Grounds) -> Decision:
    """Return the recommendation if training can only make calls cheaper."""
    best = signals.prompting.best
    if grounds.pays == "yes" and grounds.reach > -signals.margin:
        why = f"Cheaper calls would pay for training, but it is not shown to be as good as {best}."
        return Decision("can't tell", None, why)
    kind = next(a.kind for a in signals.prompting.arms if a.name == signals.cheapest)
    why = f"No adapter of these rows can beat {best} by more than the margin of {100 * signals.margin:g} points"
    if grounds.pays == "no":
        why += ", and cheaper calls would not pay for training"
    return Decision("retrieve" if kind in RETRIEVING else "prompt", signals.cheapest, f"{why}.")


def _unsettled(signals: Signals) -> str:
    gain = signals.gain
    if gain is None:
        return f"There is no pilot ({signals.left_out['gain']}), and prompting leaves room for an adapter to beat it."
    margin = f"the margin of {100 * signals.margin:g} points"
    if gain.contrast.interval.low > signals.margin and gain.contrast.p_value < SIGNIFICANT:
        return "The pilot is better, but twice the demonstrations would fit and may be better still."
    if gain.contrast.interval.high <= signals.margin:
        return f"The pilot does not beat {signals.prompting.best}, but all {gain.all_rows:,} rows may."
    return f"The interval of the pilot's gain over {signals.prompting.best} includes values on both sides of {margin}."
