"""Blind review of a shadow's differing answers, and its status: ``shadow review`` and ``shadow status``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tunewright.annotation import AnnotationLog, AnnotationSession, Mark, NoteMark, UndoMark, VerdictMark
from tunewright.core.csv import one_line_end, write_sheet
from tunewright.core.errors import UserError
from tunewright.data.review.session import reviewer_name
from tunewright.evaluation.human_eval.results import agreement
from tunewright.evaluation.human_eval.sample import treatment_is_a
from tunewright.evaluation.human_eval.session import BlindPair, Progress, Side
from tunewright.evidence.human_eval import RaterAgreement
from tunewright.evidence.shadow import (
    Asked,
    Judging,
    Look,
    Settling,
    ShadowJudge,
    ShadowStatus,
    finding,
    mean_scores,
    settling,
)
from tunewright.evidence.statistics import effective_items, wilson
from tunewright.open_project import OpenProject
from tunewright.serving.options import ShadowReviewOptions
from tunewright.serving.serve import open_state
from tunewright.serving.tenants import State
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.shadow_reviews import (
    Judgement,
    SettledUnit,
    ShadowCounts,
    ShadowEvent,
    ShadowPair,
    ShadowTrial,
)

SIDES: tuple[Side, ...] = get_args(Side)
_SIDE_OF: Mapping[str, Side] = {side.lower(): side for side in SIDES}
COLUMNS = ("request", "input", "A", "B", "verdict")
_SHARED = 5
"""One pair in this number goes to every reviewer, for their agreement."""
_SCORES = {"live": -1, "shadow": 1, "both": 0, "neither": 0}


class ShadowVerdict(VerdictMark):
    """A verdict on a pair: the better answer, or both good, or neither."""

    verdict: Side


@dataclass(frozen=True)
class ReviewState:
    """A shadow's review as it is in the state."""

    trial: ShadowTrial
    pairs: list[ShadowPair]
    counts: ShadowCounts
    events: list[ShadowEvent]
    settled: list[SettledUnit]
    judgements: list[Judgement]

    @property
    def judged(self) -> dict[str, list[str | None]]:
        """The judge's verdicts on each pair in both orders, by the response's id; pairs with one reply are left out."""
        said: dict[str, list[str | None]] = {}
        for each in self.judgements:
            said.setdefault(each.response_id, []).append(each.verdict)
        return {key: both for key, both in said.items() if len(both) == len((False, True))}

    @property
    def judge_scores(self) -> dict[str, float]:
        """The judge's answer about each pair; a missing verdict, or one that changes with the order, is a tie."""
        same = {key: said.count(said[0]) == len(said) for key, said in self.judged.items()}
        return {key: float(_SCORES[said[0] or "both"]) * same[key] for key, said in self.judged.items()}

    @property
    def verdicts(self) -> dict[str, dict[str, str]]:
        """The current verdict on each pair by the response's id, then reviewer."""
        stacks: dict[str, dict[str, list[str]]] = {}
        for each in self.events:
            stack = stacks.setdefault(each.response_id, {}).setdefault(each.reviewer, [])
            if each.verdict is not None:
                stack.append(each.verdict)
            elif stack:
                stack.pop()
        return {key: {name: stack[-1] for name, stack in of.items() if stack} for key, of in stacks.items()}

    def settling(self) -> Settling:
        """Return the units that follow in the sequence, and what they wait for."""
        settled = {unit.unit for unit in self.settled}
        units: dict[str, list[Asked]] = {}
        for pair in self.pairs:
            if pair.unit not in settled:
                units.setdefault(pair.unit, []).append(Asked(pair.started, pair.id if pair.differs else None))
        lasting = {pair.unit for pair in self.pairs if pair.unit_kind == "request"}
        judging, judge = Judging(), self.trial.judge
        if judge is not None:
            judging = Judging(judge.share, project_seed(self.trial), self.judge_scores, takes_part=True)
        before = sum(unit.confirmed for unit in self.settled), sum(unit.squares for unit in self.settled)
        return settling(units, lasting, mean_scores(self.verdicts), self.counts.time, judging, before)


def read_review(
    project: OpenProject, state: State, alias: str, options: ShadowReviewOptions, *, declare: bool = True
) -> ReviewState:
    """Return the review of an alias's newest shadow; ``declare`` its terms now if they have not been."""
    margin = project.folder.config.evaluate.margin
    trial = state.shadow_reviews.trial(alias, margin, options.max_units, declare=declare)
    pairs, counts = state.shadow_reviews.pairs(trial)
    if not pairs:
        project.reporter.warn(
            f"No request of the shadow of {alias} is recorded, and a review needs the prompts. "
            "`tunewright tenant record NAME --contract REF` records a tenant's requests."
        )
    reviews = state.shadow_reviews
    return ReviewState(trial, pairs, counts, reviews.events(trial), reviews.settled(trial), reviews.judgements(trial))


def status(project: OpenProject, alias: str, options: ShadowReviewOptions = ShadowReviewOptions()) -> ShadowStatus:
    """Return what the verdicts on an alias's newest shadow show now. You may look at any time, and stop.

    A unit whose differing answers have verdicts enters the sequence and does not change: later verdicts on it count for
    the reviewers' agreement only.

    Args:
        alias: its name.
        options: the maximum, declared with the margin of the config at the first look.

    Raises:
        UserError: no such alias, or it never had a shadow.
    """
    with open_state(project) as state:
        read = read_review(project, state, alias, options)
        trial = read.trial
        next_units = read.settling()
        room = max(0, trial.most_units - len(read.settled))
        tenant_of = {pair.unit: pair.tenant_id for pair in read.pairs}
        new = [SettledUnit(**{**asdict(each), "tenant_id": tenant_of[each.unit]}) for each in next_units.units[:room]]
        state.shadow_reviews.settle(trial, len(read.settled), new)
        units = state.shadow_reviews.settled(trial)
    agreements, judge = _agreements(read), _judge(read)
    found, looks = None, list[Look]()
    if units:
        values, labels = [unit.value for unit in units], [unit.labels for unit in units]
        reviewers = sorted({each.reviewer for each in read.events})
        count = sum(unit.requests for unit in units)
        found, looks = finding(values, count, labels, trial.margin, agreements, reviewers, judge)
    kinds = {pair.unit: pair.unit_kind for pair in read.pairs}
    ended = len(units) >= trial.most_units
    return ShadowStatus(
        alias=alias,
        release=trial.release,
        candidate=trial.candidate,
        live=trial.live,
        margin=trial.margin,
        most_units=trial.most_units,
        pairs=len(read.pairs),
        differing=sum(pair.differs for pair in read.pairs),
        unanswered=read.counts.unanswered,
        unrecorded=read.counts.unrecorded,
        kinds={kind: list(kinds.values()).count(kind) for kind in sorted(set(kinds.values()))},
        incomplete=next_units.incomplete,
        waiting=0 if ended else len(next_units.waiting),
        unjudged=0 if ended else len(next_units.unjudged),
        judge=judge,
        finding=found,
        ended=ended,
        agreements=tuple(agreements),
        looks=looks,
    )


def _agreements(read: ReviewState) -> list[RaterAgreement]:
    """Return the agreement of each two reviewers on the pairs that both judged."""
    said: dict[str, dict[str, int]] = {}
    for key, of in read.verdicts.items():
        for name, verdict in of.items():
            if verdict != "skip":
                said.setdefault(name, {})[key] = _SCORES[verdict]
    unit_of = {pair.id: pair.unit for pair in read.pairs}
    found = []
    for a, b in combinations(sorted(said), 2):
        if both := sorted(said[a].keys() & said[b].keys() & unit_of.keys()):
            ours, theirs = ([said[name][key] for key in both] for name in (a, b))
            found.append(agreement((a, b), ours, theirs, [unit_of[key] for key in both], project_seed(read.trial)))
    return found


def _judge(read: ReviewState) -> ShadowJudge | None:
    """Return the judge that takes part, with its agreement with people on the pairs that both judged."""
    if read.trial.judge is None:
        return None
    judge, scores, people = read.trial.judge, read.judge_scores, mean_scores(read.verdicts)
    unit_of = {pair.id: pair.unit for pair in read.pairs}
    both = sorted(people.keys() & scores.keys() & unit_of.keys())
    agreed, low, high, kappa = 0, 0.0, 1.0, None
    if both:
        ours, theirs = [int(np.sign(people[key])) for key in both], [int(scores[key]) for key in both]
        where = [unit_of[key] for key in both]
        measured = agreement(("people", judge.model), ours, theirs, where, project_seed(read.trial))
        agreed, kappa = measured.agreed, measured.kappa
        interval = wilson(agreed / len(both), effective_items(np.equal(ours, theirs).astype(float), where))
        low, high = interval.low, interval.high
    unread = sum(None in said for said in read.judged.values())
    counts = len(scores), unread, len(both), agreed
    return ShadowJudge(judge.model, judge.url, judge.share, *counts, low, high, kappa)


def project_seed(trial: ShadowTrial) -> int:
    """Return the seed of a shadow, which decides the sides of its pairs and the ones that go to every reviewer."""
    return int(trial.digest[:8], 16) + trial.release


def review(
    project: OpenProject,
    alias: str,
    options: ShadowReviewOptions = ShadowReviewOptions(),
    *,
    reviewer: str | None = None,
) -> ShadowReview:
    """Begin or resume a reviewer's blind pass over the differing answers of an alias's newest shadow.

    Raises:
        UserError: no such alias, it never had a shadow, or the records cannot be read.
    """
    return ShadowReview(project, alias, options, reviewer_name(reviewer, project.folder.root))


class ShadowReview(AnnotationSession[ShadowVerdict, BlindPair, Side]):
    """One reviewer's pass over a shadow's differing pairs. Nothing in it reveals the adapter of an answer."""

    verdict_keys = (
        ("a", "A", "A is better"),
        ("b", "B", "B is better"),
        ("g", "both", "both good"),
        ("x", "neither", "neither"),
        ("s", "skip", "skip"),
    )
    sheet_columns = COLUMNS
    sheet_command = "tunewright shadow review --export"

    def __init__(self, project: OpenProject, alias: str, options: ShadowReviewOptions, reviewer: str) -> None:
        self._project, self._alias, self._options = project, alias, options
        with open_state(project) as state:
            self._trial = read_review(project, state, alias, options).trial
            self._texts = state.shadow_reviews.texts(self._trial, KeyFile(project.folder.record_key))
        self._seed = project_seed(self._trial)
        super().__init__(reviewer.strip())

    def read_log(self) -> AnnotationLog[ShadowVerdict]:
        with open_state(self._project) as state:
            read = read_review(self._project, state, self._alias, self._options)
        self._same = sum(not pair.differs for pair in read.pairs)
        # Requests that came after the pass began have no text here: the next pass shows them.
        waiting = [key for key in read.settling().waiting if key in self._texts]
        judged = [
            pair.id for pair in read.pairs if pair.differs and pair.id in read.verdicts and pair.id in self._texts
        ]
        self._order = list(dict.fromkeys([*waiting, *judged]))
        self._judged_by_others = {
            key
            for key, of in read.verdicts.items()
            if any(verdict != "skip" for name, verdict in of.items() if name != self.reviewer)
        }
        marks: list[Mark] = []
        for each in read.events:
            head: dict[str, Any] = {"key": each.response_id, "reviewer": each.reviewer, "when": str(each.time)}
            if each.verdict is None:
                marks.append(UndoMark(**head))
            else:
                marks.append(ShadowVerdict(**head, verdict=self._side(each.response_id, each.verdict)))
        return AnnotationLog(marks)

    def append(self, events: Sequence[Mark]) -> None:
        if any(isinstance(event, NoteMark) for event in events):
            # What a note says of a request would outlive the request's deletion.
            raise UserError("Requests of a shadow take no notes", fix="Judge the pair, or skip it.")
        said = []
        for event in events:
            verdict = self._named(event.key, event.verdict) if isinstance(event, ShadowVerdict) else None
            said.append((event.key, verdict))
        with open_state(self._project) as state:
            state.shadow_reviews.say(self._trial, self.reviewer, said)

    def _side(self, key: str, verdict: str) -> Side:
        if verdict not in ("live", "shadow"):
            return _SIDE_OF[verdict]
        return "A" if (verdict == "shadow") == treatment_is_a(self._seed, key) else "B"

    def _named(self, key: str, side: str) -> str:
        if side not in ("A", "B"):
            return side
        return "shadow" if (side == "A") == treatment_is_a(self._seed, key) else "live"

    def queue(self) -> Sequence[str]:
        return self._order

    def is_open(self, key: str) -> bool:
        said = self.verdict(key)
        if said is not None and said.verdict != "skip":
            return False
        shared = hashlib.sha256(f"{self._seed}:shared:{key}".encode()).digest()[0] % _SHARED == 0
        return shared or key not in self._judged_by_others

    def item(self, key: str) -> BlindPair:
        """Return a pair in the form that the reviewer may see."""
        texts, said = self._texts[key], self.verdict(key)
        answers = [texts.shadow, texts.live]
        a, b = answers if treatment_is_a(self._seed, key) else reversed(answers)
        number = self._order.index(key) + 1
        return BlindPair(key, number, input_text(texts.request), a, b, None, "", None if said is None else said.verdict)

    @property
    def progress(self) -> Progress:
        """This reviewer's progress."""
        said = [mark.verdict for key in self._order if (mark := self.verdict(key)) is not None]
        skipped = said.count("skip")
        left = sum(self.is_open(key) for key in self._order) - skipped
        return Progress(len(said) - skipped, skipped, len(said) + left, self._same)

    def judge(self, item: BlindPair, verdict: Side) -> None:
        self.record([self.mark(ShadowVerdict, item.key, verdict=verdict)])

    def export_sheet(self, path: Path) -> int:
        """Write the pairs that the reviewer has not judged to a spreadsheet, and return their number."""
        keys = self.open_keys()
        if not keys:
            raise UserError(
                f"{self.reviewer} has judged all pairs", fix="`tunewright shadow status` shows the results."
            )
        pairs = map(self.item, keys)
        write_sheet(path, COLUMNS, [[pair.key, pair.input, pair.a, pair.b, ""] for pair in pairs])
        return len(keys)

    def sheet_fault(self, cells: Mapping[str, str], where: str) -> str | None:
        key, verdict = cells["request"], cells["verdict"].strip()
        if key not in self._order:
            what = f"The shadow of {self._alias} has no pair of the request {key!r}, or it was deleted"
            raise UserError(f"{what}; no verdict was recorded", where=where, fix="Remove the row and import again.")
        if verdict and verdict.lower() not in _SIDE_OF:
            return f"the verdict is {verdict!r}; it can be {', '.join(SIDES)} or nothing"
        pair = self.item(key)
        changed = [name for name, text in (("A", pair.a), ("B", pair.b)) if cells[name] != one_line_end(text)]
        return f"answer {changed[0]} was changed: restore the exported text" if changed else None

    def sheet_marks(self, cells: Mapping[str, str]) -> list[Mark]:
        key, side = cells["request"], _SIDE_OF.get(cells["verdict"].strip().lower())
        known = self.verdict(key)
        if side is None or (known is not None and known.verdict == side):
            return []
        return [self.mark(ShadowVerdict, key, verdict=side)]


def input_text(request: Mapping[str, Any]) -> str:
    """Return what a reviewer reads of a request: its messages, or its prompt."""
    if "messages" not in request:
        return str(request.get("prompt", ""))
    messages = [(str(each.get("role")), _content(each)) for each in request["messages"]]
    if len(messages) == 1:
        return messages[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in messages)


def _content(message: Mapping[str, Any]) -> str:
    """Return a message's text; its calls are added as JSON."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)
    calls = message.get("tool_calls")
    return f"{text}\n{calls}".strip() if calls else text
