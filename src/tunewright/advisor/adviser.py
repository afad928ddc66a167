"""Measurement of a project's signals, one after the other; finished ones are reused by the next call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from tunewright.adapters.registry import Adapter
from tunewright.advisor.context import Answers, Items, cheapest_enough, context_budget
from tunewright.advisor.costs import Lengths, break_even, measured_speed, token_prices, training_cost
from tunewright.advisor.pilot import Part, gain, measured_part, missing_pilots, pilot_parts, train_pilot
from tunewright.advisor.result import AdviceResult
from tunewright.advisor.signals import (
    BitsPerByte,
    BreakEven,
    ContextBudget,
    Format,
    Signals,
    Specificity,
    Speed,
    TuningGain,
    load_signals,
)
from tunewright.advisor.specificity import fertility, form, surprise
from tunewright.chat import Tokens
from tunewright.chat.answers import answer_length
from tunewright.core.errors import UserError
from tunewright.core.io import digest, json_document, write_json
from tunewright.data.versions import Member
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.arm_runner import ArmRunner, measured_arm, measured_with, scored_arms
from tunewright.evaluation.arms import TUNED, TUNED_CONSTRAINED, ZERO_SHOT, ArmPlan, plan_of
from tunewright.evaluation.forgetting import ForgettingMeter
from tunewright.evaluation.generations import Generator
from tunewright.evaluation.losses import answer_losses
from tunewright.evaluation.prompt_search import advice_file, advise, first_items
from tunewright.evaluation.workload import Workload, limit_time
from tunewright.evidence.schema import Advice
from tunewright.training.rows import trained_spans
from tunewright.training.train import training_inputs
from tunewright.training.trainings import Trainings

GENERIC_SAMPLES = 32
"""Number of the base's own answers: about a thousand words."""
SURPRISED_ITEMS = 256
"""Maximum number of dev items whose reference answers are scored."""


class Adviser:
    """Measurement of the signals of one dataset version and base.

    Args:
        open_measurement: opens the arm runner for the dev split; its project's config sets everything else. It is
            called again for the pilots, so that no second base is in memory during their training.
        pilots: where pilot adapters are trained (None: train none, and leave out the signals that need them).
        minutes: time limit for answers (None: no limit); arms that do not fit are left out, the pilots never.

    Raises:
        UserError: ``minutes`` is not above 0.
    """

    def __init__(
        self,
        open_measurement: Callable[[], ArmRunner],
        *,
        pilots: Trainings | None,
        minutes: float | None = None,
    ) -> None:
        self._open, self._pilots = open_measurement, pilots
        self.arm_runner = arm_runner = open_measurement()
        self.project = arm_runner.project
        self.config = arm_runner.project.config
        self.version = arm_runner.version
        self.reporter = arm_runner.reporter
        self.dev = self.version.examples("dev")
        self.items = self._items(self.dev)
        self.left_out: dict[str, str] = {}
        self.parts = [] if pilots is None else self._parts()
        if pilots is None:
            self.left_out["gain"] = "--no-pilot"
        self.countdown = self.generator.countdown
        self._turns = 0
        if self.config.regressions.samples:
            self._turns = self._meter().sampler.turns_missing(GENERIC_SAMPLES)
        else:
            self.left_out["generic text"] = "regressions.samples is 0"
        limit_time(arm_runner, minutes, pilots=len(self.parts))

    @property
    def generator(self) -> Generator:
        """The generator that answers prompts."""
        return self.arm_runner.generator

    def _parts(self) -> list[Part]:
        try:
            return pilot_parts(self.project, self.version)
        except UserError as error:
            self.left_out["gain"] = error.what
            self.reporter.warn(f"No pilot: {error.what}.")
            return []

    def advise(self) -> AdviceResult:
        """Measure the signals that are not stored yet, and store them.

        Raises:
            UserError: any error of measuring the arms or of a training.
            KeyboardInterrupt: stopped by a signal; the next call resumes from there.
        """
        known = advice_file(self.arm_runner)
        measured = known.exists() and self._file(known).exists()
        pilots, turns = (0, 0) if measured else (len(self.parts), self._turns)
        # No variable holds the workload: its arm runner's base is freed before the pilots are trained.
        prompting = advise(self.arm_runner, Workload(self.arm_runner, pilots=pilots, turns=turns).announce)
        file = self._file(prompting.file)
        access_log = AccessLog(self.project.evaluations)
        if file.exists():
            access_log.require(file)
            return AdviceResult(file, load_signals(file), measured=False)
        signals = self._signals(file.stem, prompting.advice)
        access_log.write(file, json_document(signals.model_dump(mode="json")))
        return AdviceResult(file, signals, measured=True)

    def _file(self, prompting: Path) -> Path:
        """Return the path of the stored signals, named by a digest of their inputs."""
        decides = {
            "prompting": prompting.name,
            "pilots": [
                training_inputs(self.project, part.version, self.generator.base, self.generator.chat)
                for part in self.parts
            ],
            "left_out": self.left_out,
            "advise": self.config.advise.model_dump(mode="json"),
            "margin": self.config.evaluate.margin,
        }
        return self.project.advice / f"{digest(decides)[:12]}.json"

    def _signals(self, identity: str, advice: Advice) -> Signals:
        arms = {arm.name: self._answers(plan_of(arm), arm.name, self.dev) for arm in advice.arms}
        best = arms[advice.best]
        context = self._context(advice)
        enough = {p.arm for curve in context.curves for p in curve.points if p.shots == curve.enough}
        shown = [a for name, a in arms.items() if name in {ZERO_SHOT.name, advice.best} | enough]
        specificity = self._specificity(shown, arms.get(f"{ZERO_SHOT.name}+constrained"))
        measured, even = self._pilot(best)
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
            specificity=specificity,
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
        return context_budget(
            [self._answers(plan_of(arm), arm.name, members) for arm in entrants],
            self._items(members),
            self.arm_runner.context,
            [len(self.generator.chat.prompt(m.example.prompt)) for m in self.dev],
            self._train_lengths,
        )

    @cached_property
    def _train_lengths(self) -> list[int]:
        """The lengths of the training answers in tokens, with their end tokens."""
        chat = self.generator.chat
        rows = chat.tokens([chat.rendered_rows(m.example.messages)[-1] for m in self.version.domain_of("train")])
        return [answer_length(row.loss_mask) for row in rows]

    def _tokens(self, texts: Sequence[str]) -> list[int]:
        """Return each text's length in tokens, without its end token."""
        found = self.generator.chat.tokenizer(list(texts), add_special_tokens=False)
        return [len(ids) for ids in found["input_ids"]]

    # Specificity

    def _specificity(self, arms: Sequence[Answers], constrained: Answers | None) -> Specificity:
        zero_shot = next(a for a in arms if a.arm.name == ZERO_SHOT.name)
        generic = self._generic()
        outputs = [m.example.output for m in self.version.domain]
        return Specificity(
            fertility=fertility(
                list(zip(outputs, self._tokens(outputs), strict=True)),
                [m.cluster for m in self.version.domain],
                list(zip(generic, self._tokens(generic), strict=True)) if generic else [],
                self.config.seed,
            ),
            surprise=[self._surprise(arm) for arm in arms],
            format=self._form(zero_shot, constrained),
        )

    def _form(self, zero_shot: Answers, constrained: Answers | None) -> Format | None:
        metrics, examples = self.config.evaluate.metrics, [m.example for m in self.dev]
        zero_shot_form = form(metrics, zero_shot.texts, examples)
        if zero_shot_form is None or constrained is None:
            return zero_shot_form
        held = form(metrics, constrained.texts, examples)
        return zero_shot_form.model_copy(update={"constrained": held and held.valid})

    def _meter(self) -> ForgettingMeter:
        return ForgettingMeter(self.project, self.version, self.generator, GENERIC_SAMPLES)

    def _generic(self) -> list[str]:
        """Return text that the base writes unprompted, from the same draw as the forgetting measurement."""
        if not self.config.regressions.samples:
            return []
        try:
            drawn = self._meter().drawn
        except UserError as error:
            self.left_out["generic text"] = error.what
            self.reporter.warn(f"Tokens per word have no generic text to be compared with: {error.what}.")
            return []
        return [sample.answer for sample in drawn.used]

    def _surprise(self, arm: Answers) -> BitsPerByte:
        """Return bits per byte of the reference answers after this arm's prompts, on `SURPRISED_ITEMS` sampled rows."""
        places = sorted(range(len(self.dev)), key=lambda n: _seeded_order(self.config.seed, self.dev[n].key))[
            :SURPRISED_ITEMS
        ]
        rows = {n: row for n in places if (row := self._row(self.dev[n], arm.prompts[n])) is not None}
        losses = self._losses(arm, rows)
        return surprise(
            arm.arm.name,
            arm.arm.shots,
            # The mean covers the answer's tokens, including its end token.
            [losses[n] * sum(rows[n].loss_mask) for n in rows],
            [self.dev[n].example.output for n in rows],
            [self.dev[n].cluster for n in rows],
            self.config.seed,
        )

    def _row(self, member: Member, prompt: tuple[int, ...]) -> Tokens | None:
        """Return the prompt with the reference answer; None if they exceed the context."""
        whole = self.generator.chat.encode(member.example.messages)
        start, end = trained_spans(whole)[-1]
        answer = whole.ids[start:end]
        if len(prompt) + len(answer) > self.arm_runner.context:
            return None
        return Tokens((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))

    def _losses(self, arm: Answers, rows: Mapping[int, Tokens]) -> dict[int, float]:
        generator = self.generator
        decides = {
            "rows": [row.ids for row in rows.values()],
            "base": generator.base.digest,
            "weights": generator.weights,
        }
        file = self.project.work / "surprise" / f"{digest(decides)[:16]}.json"
        if file.exists():
            return dict(zip(rows, json.loads(file.read_text(encoding="utf-8")), strict=True))
        losses: dict[int, float] = {}
        title = f"the right answers after {arm.arm.name}"
        with self.reporter.task(title, len(rows), "answers") as task, generator.answering(None) as model:
            for found in answer_losses(model, rows, generator.chat.tokenizer.pad_token_id):
                losses |= found
                task.advance(len(found))
        ordered = {n: losses[n] for n in rows}
        write_json(file, list(ordered.values()))
        return ordered

    # Pilot and costs

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
        missing = missing_pilots(self.project, self.version, self.parts, base, chat)
        assert self._pilots is not None
        self._pilots.train_missing(missing, chat)
        adapters = []
        for part in self.parts:
            self.reporter.say(f"Pilot on {part.rows:,} of {all_rows:,} training rows")
            adapters.append(train_pilot(self.project, self.version, part, base, chat, self.reporter).adapter)
        pilots = list(zip(self.parts, adapters, strict=True))
        # Constrain the pilot to a grammar if the prompt that it is compared with is constrained.
        plan = TUNED_CONSTRAINED if best.arm.constrained else TUNED
        self.generator.countdown = self.countdown
        with self.countdown.shown():
            answers = [self._answers(plan, f"pilot-{part.rows}", self.dev, adapter) for part, adapter in pilots]
        parts = [
            measured_part(part, adapter, given, self.items)
            for (part, adapter), given in zip(pilots, answers, strict=True)
        ]
        if not priced:
            speed[answers[-1].arm.name] = self._speed(answers[-1], adapters[-1])
        measured = gain(parts, answers, best, self.items, all_rows)
        return measured, self._break_even(measured, best, answers[-1], speed)

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
        written = zip(self._tokens(answers.texts), answers.truncated, strict=True)
        return Lengths(
            arm=answers.arm.name,
            inputs=[len(prompt) for prompt in answers.prompts],
            outputs=[tokens + (not truncated) for tokens, truncated in written],
            cached=answers.arm.shared_tokens,
        )


def _seeded_order(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()
