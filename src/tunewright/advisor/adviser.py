"""Measurement of a project's signals, one after the other; finished ones are reused by the next call."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.adapters.registry import Adapter
from tunewright.advisor.costs import Lengths, break_even, measured_speed, token_prices, training_cost
from tunewright.advisor.signals import (
    BreakEven,
    ContextBudget,
    Doubling,
    PilotPart,
    ShotCurve,
    ShotPoint,
    Signals,
    Speed,
    Ternary,
    TuningGain,
    load_signals,
)
from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_length
from tunewright.config import MetricName
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest, json_document
from tunewright.data.splits import FEWEST_TRAINING_PAIRS
from tunewright.data.versions import DatasetVersion, Member
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.arm_runner import ArmRunner, measured_arm, measured_with, scored_arms
from tunewright.evaluation.arms import TUNED, TUNED_CONSTRAINED, ZERO_SHOT, ArmPlan, plan_of
from tunewright.evaluation.folds import subset_versions
from tunewright.evaluation.free_arms import FittedArms
from tunewright.evaluation.generations import Generator
from tunewright.evaluation.prompt_search import advise, first_items
from tunewright.evaluation.workload import time_limit
from tunewright.evidence.common import ArmScore, Interval
from tunewright.evidence.incumbents import measured_drop
from tunewright.evidence.schema import Advice, Arm, Contrast
from tunewright.evidence.scoring import contrast
from tunewright.metrics import Scores, score_all
from tunewright.models.bases import Base
from tunewright.training.train import find_trained, train, training_inputs
from tunewright.training.trainings import Training, Trainings


class Adviser:
    """Measurement of the signals of one dataset version and base.

    ``open_measurement`` opens the arm runner for the dev split; it is called again for the pilots, so that no second
    base is in memory during their training. ``pilots`` is where they are trained (None: leave out the signals that
    need them). Arms that do not fit in ``minutes`` are left out, the pilots never.
    """

    def __init__(
        self,
        open_measurement: Callable[[], ArmRunner],
        *,
        pilots: Trainings | None,
        minutes: float | None = None,
    ) -> None:
        self._open, self._pilots, self._minutes = open_measurement, pilots, minutes
        self.arm_runner = arm_runner = open_measurement()
        self.project = arm_runner.project
        self.config = arm_runner.project.config
        self.version = arm_runner.version
        self.reporter = arm_runner.reporter
        self.dev = self.version.examples("dev")
        self.items = self._items(self.dev)
        self.left_out: dict[str, str] = {}
        self._pilot_scores: Scores | None = None
        self.parts: list[DatasetVersion] = []
        if pilots is None:
            self.left_out["gain"] = "--no-pilot"
        else:
            try:
                self.parts = pilot_parts(self.project, self.version)
            except UserError as error:
                self.left_out["gain"] = error.what
                self.reporter.warn(f"No pilot: {error.what}.")

    @property
    def generator(self) -> Generator:
        """The generator that answers prompts."""
        return self.arm_runner.generator

    def advise(self) -> tuple[Path, Signals, bool]:
        """Return the signals with their file, and whether they were measured now; a stopped call resumes."""
        prompting = advise(self.arm_runner, time_limit(self.arm_runner, self._minutes, pilots=len(self.parts)))
        decides = {
            "prompting": prompting.file.name,
            "pilots": [
                training_inputs(self.project, part, self.generator.base, self.generator.chat) for part in self.parts
            ],
            "left_out": self.left_out,
            "advise": self.config.advise.model_dump(mode="json"),
            "margin": self.config.evaluate.margin,
        }
        file = self.project.advice / f"{digest(decides)[:12]}.json"
        access_log = AccessLog(self.project.evaluations)
        if file.exists():
            access_log.require(file)
            return file, load_signals(file), False
        signals = self._signals(file.stem, prompting.advice)
        access_log.write(file, json_document(signals.model_dump(mode="json")))
        return file, signals, True

    def _signals(self, identity: str, advice: Advice) -> Signals:
        arms = {arm.name: self._answers(plan_of(arm), arm.name, self.dev) for arm in advice.arms}
        best = arms[advice.best]
        context = self._context(advice)
        measured, even = self._pilot(best)
        if advice.free is not None and self._pilot_scores is not None:
            texts = FittedArms(self.arm_runner).answers(advice.free.best, self.dev)
            ours = score_all(self.arm_runner.scorers[0], texts, [m.example for m in self.dev])
            drop = measured_drop(ours, self._pilot_scores, self.items.clusters, self.items.margin, self.items.seed)
            advice = advice.model_copy(update={"free": advice.free.model_copy(update={"tuned": drop})})
        return Signals(
            id=identity,
            project=self.config.name,
            metric=self.items.metric,
            margin=self.items.margin,
            items=len(self.dev),
            clusters=len(set(self.items.clusters)),
            pairs=len(self.version.domain),
            prompting=advice,
            cheapest=cheapest_enough(list(arms.values()), best, self.items).arm.name,
            context=context,
            break_even=even,
            gain=measured,
            left_out=self.left_out,
            lineage={
                **measured_with(
                    self.config,
                    self.generator.base,
                    self.generator.chat,
                    self.generator.quantization,
                    self.arm_runner.limit,
                ),
                "dataset": self.version.digest,
                "dev_split": self.version.split_digest("dev"),
                "config": self.config.deciding(),
            },
        )

    def _items(self, members: Sequence[Member]) -> Items:
        return Items(
            clusters=[m.cluster for m in members],
            metric=self.arm_runner.scorers[0].name,
            margin=self.config.evaluate.margin,
            seed=self.config.seed,
        )

    def _answers(self, plan: ArmPlan, name: str, members: Sequence[Member], adapter: Adapter | None = None) -> Answers:
        answers = self.arm_runner.answers(plan, members, "dev", adapter)
        scored = scored_arms(self.arm_runner.scorers, members, {name: answers})
        return Answers(
            arm=measured_arm(name, plan, answers, scored, self.config.seed),
            texts=[a.text for a in answers],
            prompts=[a.prompt for a in answers],
            truncated=[a.truncated for a in answers],
            scores=scored.of_arm(name)[0],
        )

    def _context(self, advice: Advice) -> ContextBudget:
        """Return the context signal from the dev items that every arm has answered."""
        narrowing, members = advice.narrowing, self.dev
        if narrowing is not None:
            members = [self.dev[place] for place in first_items(self.dev, narrowing.items, self.config.seed)]
        entrants = advice.arms if narrowing is None else narrowing.arms
        chat = self.generator.chat
        trained = chat.tokens([chat.rendered_rows(m.example.messages)[-1] for m in self.version.domain_of("train")])
        return context_budget(
            [self._answers(plan_of(arm), arm.name, members) for arm in entrants],
            self._items(members),
            self.arm_runner.context,
            [len(chat.prompt(m.example.prompt)) for m in self.dev],
            [answer_length(row.loss_mask) for row in trained],
        )

    def _pilot(self, best: Answers) -> tuple[TuningGain | None, BreakEven | None]:
        if not self.parts:
            self.left_out["break_even"] = "it takes the pilot's time and answers"
            return None, None
        priced = (prices := self.config.advise.prices) is not None and prices.input is not None
        # measured before an adapter is loaded
        speed = {} if priced else {best.arm.name: self._speed(best)}
        self.arm_runner = self._open()
        all_rows = len(self.version.domain_of("train"))
        base, chat = self.generator.base, self.generator.chat
        trainings = [pilot_training(self.project, self.version, part) for part in self.parts]
        known = [_trained_elsewhere(self.project, part, base, chat) for part in self.parts]
        assert self._pilots is not None
        self._pilots.train_missing([each for each, adapter in zip(trainings, known, strict=True) if not adapter], chat)
        pilots = []
        for part, training, adapter in zip(self.parts, trainings, known, strict=True):
            rows = len(part.domain_of("train"))
            self.reporter.say(f"Pilot: a trial adapter, trained on {rows:,} of {all_rows:,} training rows")
            facts, place = training.facts, training.adapters
            adapter = (
                adapter or train(self.project, part, base, chat, self.reporter, adapters=place, facts=facts).adapter
            )
            pilots.append((rows, adapter))
        # Constrain the pilot to a grammar if the prompt that it is compared with is constrained.
        plan = TUNED_CONSTRAINED if best.arm.constrained else TUNED
        answers = [self._answers(plan, f"pilot-{rows}", self.dev, adapter) for rows, adapter in pilots]
        parts = [
            PilotPart(
                rows=rows,
                score=self.items.score(given),
                adapter=adapter.digest,
                seconds=adapter.lineage["training"]["seconds"],
            )
            for (rows, adapter), given in zip(pilots, answers, strict=True)
        ]
        if not priced:
            speed[answers[-1].arm.name] = self._speed(answers[-1], pilots[-1][1])
        pilot, nested = answers[-1], len(parts) > 1
        self._pilot_scores = pilot.scores
        measured = TuningGain(
            parts=parts,
            all_rows=all_rows,
            contrast=self.items.contrast(pilot, best),
            slope=per_doubling(pilot, answers[-2], parts[-1].rows, parts[-2].rows, self.items) if nested else None,
        )
        return measured, self._break_even(measured, best, pilot, speed)

    def _break_even(self, measured: TuningGain, best: Answers, tuned: Answers, speed: dict[str, Speed]) -> BreakEven:
        prices = self.config.advise.prices
        training = training_cost(prices, measured.pilot.seconds * measured.all_rows / measured.pilot.rows)
        return break_even(
            self.config.advise,
            (self._lengths(best), token_prices(prices, speed.get(best.arm.name))),
            (self._lengths(tuned), token_prices(prices, speed.get(tuned.arm.name))),
            self.items.clusters,
            training=training,
            evaluation_calls=len(self.version.examples("test")),
            speed=speed,
            seed=self.config.seed,
        )

    def _speed(self, answers: Answers, adapter: Adapter | None = None) -> Speed:
        """Return the speed of an arm's calls, with the base alone or with the adapter loaded unmerged as in `serve`."""
        generator = self.generator
        with self.reporter.task(f"timing {answers.arm.name}", 1, "batches") as task:
            model = generator.model_with(adapter)
            name = None if adapter is None else adapter.name
            speed = measured_speed(model, generator.chat, answers.prompts, name, self.config.evaluate.batch_size)
            task.advance()
        return speed

    def _lengths(self, answers: Answers) -> Lengths:
        tokens = self.generator.chat.tokenizer(list(answers.texts), add_special_tokens=False)["input_ids"]
        return Lengths(
            arm=answers.arm.name,
            inputs=[len(prompt) for prompt in answers.prompts],
            # A whole answer has an end token too.
            outputs=[len(ids) + (not cut) for ids, cut in zip(tokens, answers.truncated, strict=True)],
            cached=answers.arm.shared_tokens,
        )


def pilot_parts(project: ProjectFolder, version: DatasetVersion) -> list[DatasetVersion]:
    """Return half of the pilot's rows, if enough to train on, and the pilot's: nested, with whole clusters.

    The pilot has `advise.pilot_fraction` of the rows, but at least `FEWEST_TRAINING_PAIRS` and at most
    `advise.pilot_max_samples`.
    """
    settings = project.config.advise
    count = len(version.domain_of("train"))
    if count < FEWEST_TRAINING_PAIRS:
        raise UserError(f"A pilot needs at least {FEWEST_TRAINING_PAIRS} training pairs (got {count})")
    wanted = min(max(settings.pilot_fraction * count, FEWEST_TRAINING_PAIRS), settings.pilot_max_samples, count)
    parts = [rows / count for rows in (wanted / 2, wanted) if rows >= FEWEST_TRAINING_PAIRS]
    return subset_versions(version, sorted({*parts, 1.0}), project.config.seed)[: len(parts)]


def pilot_training(project: ProjectFolder, version: DatasetVersion, part: DatasetVersion) -> Training:
    """Return the training of a pilot on a part of a version; its adapter is kept apart from served adapters."""
    rows = len(part.domain_of("train"))
    facts: dict[str, Any] = {"pilot": {"of": version.digest, "rows": rows}}
    return Training(f"pilot on {rows:,} rows", project, part, project.pilot_adapters, facts)


def _trained_elsewhere(project: ProjectFolder, part: DatasetVersion, base: Base, chat: ChatFormat) -> Adapter | None:
    """Return the adapter that a training of the project or of a learning curve has made of a part."""
    inputs = digest(training_inputs(project, part, base, chat))
    found = (find_trained(place, project.config.name, inputs) for place in (project.adapters, project.curve_adapters))
    return next((adapter for adapter in found if adapter is not None), None)


@dataclass(frozen=True)
class Answers:
    """One arm with its answers to some items, in their order."""

    arm: Arm
    texts: Sequence[str]
    prompts: Sequence[tuple[int, ...]]
    truncated: Sequence[bool]
    scores: Scores
    """Scores by the deciding metric."""


@dataclass(frozen=True)
class Items:
    """Some dev items, with the metric that scores their answers."""

    clusters: Sequence[str]
    metric: MetricName
    margin: float
    seed: int

    def score(self, answers: Answers) -> ArmScore:
        """Return an arm's score on these items, by the deciding metric."""
        return answers.arm.score(self.metric)

    def contrast(self, treatment: Answers, control: Answers) -> Contrast:
        """Return the contrast of two arms on these items."""
        return contrast(
            treatment=treatment.arm.name,
            control=control.arm.name,
            ours=treatment.scores,
            theirs=control.scores,
            clusters=self.clusters,
            seed=self.seed,
        )

    def difference(self, treatment: Answers, control: Answers) -> tuple[float, Interval]:
        """Return the paired difference of two arms' scores with its 95% interval."""
        measured = self.contrast(treatment, control)
        return measured.difference, measured.interval


def per_doubling(larger: Answers, smaller: Answers, after: int, before: int, items: Items) -> Doubling:
    """Return the gain of an arm with ``after`` rows or demonstrations over one with ``before``, per doubling."""
    difference, interval = items.difference(larger, smaller)
    # A step from k to 3 k is more than one doubling; score against log k is taken as a line between the two.
    doublings = math.log2(after / before)
    return Doubling(
        before=before,
        after=after,
        difference=difference / doublings,
        interval=Interval(low=interval.low / doublings, high=interval.high / doublings),
    )


def context_budget(
    arms: Sequence[Answers], items: Items, context: int, query_tokens: Sequence[int], output_tokens: Sequence[int]
) -> ContextBudget:
    """Return the score curve over k for each kind of demonstrations, and the number that fits.

    Of the ``arms``, zero-shot included, arms with other instructions or constrained decoding are ignored.
    ``query_tokens`` are the dev prompts' lengths without demonstrations, ``output_tokens`` the answers' lengths.
    """
    query, output = (int(np.percentile(lengths, 99, method="higher")) for lengths in (query_tokens, output_tokens))
    zero = next(a for a in arms if a.arm.name == ZERO_SHOT.name)
    kinds: dict[str, dict[int, list[Answers]]] = defaultdict(lambda: defaultdict(list))
    for answers in arms:
        if answers.arm.shots and not (answers.arm.instruction or answers.arm.optimized or answers.arm.constrained):
            kinds[_kind(answers)][answers.arm.shots].append(answers)
    free = context - query - output
    curves = []
    for name, by_shots in kinds.items():
        # The best of several draws, which is the one a static prompt would use.
        chosen = [max(draws, key=lambda a: items.score(a).value) for _, draws in sorted(by_shots.items())]
        curves.append(_curve(name, [zero, *chosen], items, free))
    return ContextBudget(items=len(items.clusters), context=context, query_p99=query, output_p99=output, curves=curves)


def _kind(answers: Answers) -> str:
    arm = answers.arm
    if arm.retriever is None:
        return arm.kind
    diverse = "" if arm.mmr is None else f", MMR {arm.mmr:g}"
    return f"{arm.kind} by {arm.retriever}{diverse}{', similar first' if arm.order == 'similar_first' else ''}"


def _curve(name: str, arms: Sequence[Answers], items: Items, free: int) -> ShotCurve:
    """Return the curve of arms that differ only in k, zero-shot first; ``free`` tokens can hold demonstrations."""
    scores = [items.score(a) for a in arms]
    best = max(range(len(arms)), key=lambda n: (scores[n].value, -arms[n].arm.shots))
    first, longest = arms[0].arm, arms[-1].arm
    each = (longest.prompt_tokens - first.prompt_tokens) / longest.shots
    halves = [a for a in arms if 0 < 2 * a.arm.shots <= longest.shots]
    last = per_doubling(arms[-1], halves[-1], longest.shots, halves[-1].arm.shots, items) if halves else None
    rising: Ternary = "unclear"
    if last is not None and last.interval.low > 0:
        rising = "yes"
    elif last is not None and last.interval.high <= items.margin:
        rising = "no"
    return ShotCurve(
        name=name,
        points=[
            ShotPoint(arm=a.arm.name, shots=a.arm.shots, score=score, prompt_tokens=a.arm.prompt_tokens)
            for a, score in zip(arms, scores, strict=True)
        ],
        best=arms[best].arm.shots,
        enough=cheapest_enough(arms[: best + 1], arms[best], items).arm.shots,
        tokens_per_example=each,
        most=max(int(free / each), 0) if each > 0 else 0,
        last=last,
        rising=rising,
    )


def cheapest_enough(arms: Sequence[Answers], best: Answers, items: Items) -> Answers:
    """Return the arm with the shortest prompts whose score is within the margin of the best arm's.

    The whole 95% interval of its paired difference must lie above minus the margin; the best arm itself always
    qualifies.
    """
    for arm in sorted(arms, key=lambda a: a.arm.prompt_tokens):
        # Non-inferiority: not "no difference found", which too few items would grant to any arm.
        if arm is best or items.difference(arm, best)[1].low > -items.margin:
            return arm
    raise AssertionError("the best is one of the arms")
