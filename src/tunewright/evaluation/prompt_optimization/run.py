"""One prompt optimization: its estimate, the search by GEPA on training rows, and the choice on dev."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tunewright.config import Config, EndpointConfig, PromptOptimizationConfig
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.core.io import digest
from tunewright.core.progress import WithoutBars
from tunewright.data.versions import Member
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.arms import (
    Instruction,
    find_instruction,
    instruction_digest,
    load_optimized,
    store_optimized,
)
from tunewright.evaluation.judge.runner import task_text
from tunewright.evaluation.time_limit import AnswerRate
from tunewright.evidence.prompt_optimization import OptimizedPrompt, PromptCandidate, ReflectionUsage
from tunewright.metrics import check_references, score_all
from tunewright.model_io.client import Endpoint
from tunewright.model_io.replies import Budget, Reply, cost, estimated_tokens

if TYPE_CHECKING:
    from gepa.core.adapter import GEPAAdapter
    from gepa.core.result import GEPAResult

    from tunewright.evaluation.prompt_optimization.gepa_adapter import InstructionAdapter

KEY = "evaluate.prompt_optimization"
_BUDGET = f"{KEY}.budget"
_FINALISTS = 3
"""Candidates that answer dev: with more, chance decides among near equals."""
_TEMPLATE_CHARACTERS = 1_200
"""Characters of GEPA's reflection prompt, without the instruction and the rows."""


@dataclass(frozen=True)
class OptimizePromptResult:
    """The result of `optimize-prompt`."""

    file: Path
    prompt: OptimizedPrompt
    optimized: bool
    """False when the same optimization had already been stored."""


@dataclass(frozen=True)
class OptimizePromptEstimate:
    """Upper limits of the calls and the cost of an optimization; tokens are guessed from characters."""

    reflection_calls: int
    metric_calls: int
    """Scored answers of the base on training rows."""
    dev_answers: int
    prompt_tokens: int
    most_completion_tokens: int | None
    """None: the parameters set no limit."""
    most_cost: float | None
    """None: no prices, or no limit on replies."""


def reflection_endpoint(config: Config) -> tuple[EndpointConfig, str]:
    """Return the reflection model's endpoint, by default the judge's, and the key of its section."""
    settings = config.evaluate.prompt_optimization or PromptOptimizationConfig()
    own = settings.reflection_model
    endpoint, where = (config.judge, "judge") if own is None else (own, f"{KEY}.reflection_model")
    if endpoint.base_url is None or endpoint.model is None:
        raise UserError(
            "The config has no reflection model",
            where=f"{KEY}.reflection_model",
            fix="Set its base_url and model (and api_key_env), or a judge, whose endpoint is used by default.",
        )
    if settings.budget is not None and (endpoint.price_input is None or endpoint.reply_limit is None):
        raise UserError(
            "A budget requires price_input, price_output and max_tokens (or max_completion_tokens) of the reflection "
            "model",
            where=_BUDGET,
            fix=f"Add them to {where}, or limit max_reflection_calls instead.",
        )
    try:
        version("gepa")
    except PackageNotFoundError:
        raise UserError("GEPA is not installed", where="optimize-prompt", fix=install_command("gepa")) from None
    return endpoint, where


class PromptOptimization:
    """One optimization, and everything that decides it."""

    def __init__(self, arm_runner: ArmRunner) -> None:
        config = arm_runner.project.config
        self.settings = config.evaluate.prompt_optimization or PromptOptimizationConfig()
        self.seed = config.seed if self.settings.seed is None else self.settings.seed
        model, where = reflection_endpoint(config)
        self.arm_runner = arm_runner
        self.reporter = arm_runner.reporter
        self.instruction = _shared_instruction(arm_runner)
        self.train = arm_runner.version.domain_of("train")
        self.dev = arm_runner.version.examples("dev")
        self.feedback, self.validation = self._parts()
        quiet = WithoutBars(self.reporter)
        budget = Budget(self.settings.budget, _BUDGET)
        self.endpoint = Endpoint(model, where, arm_runner.project.work / "prompt_optimization", budget, quiet)
        self.generator = arm_runner.generator
        self.generator.rate = AnswerRate(quiet)
        self._end: str | None = None
        self._failure: UserError | None = None

    def _parts(self) -> tuple[list[Member], list[Member]]:
        """Return the feedback rows and the validation rows: whole clusters of the training split, drawn by the seed."""
        clusters: dict[str, list[Member]] = {}
        for member in self.train:
            clusters.setdefault(member.cluster, []).append(member)
        wanted = min(self.settings.val_items, len(self.train) // 2)
        validation: list[Member] = []
        for name in sorted(clusters, key=lambda name: hashlib.sha256(f"{self.seed}:{name}".encode()).digest()):
            if len(validation) + len(clusters[name]) <= wanted:
                validation += clusters[name]
        taken = {member.key for member in validation}
        feedback = [member for member in self.train if member.key not in taken]
        if len(validation) < 2 or len(feedback) < self.settings.minibatch_size:
            raise UserError(
                f"Too few training rows: {len(self.train):,} in {len(clusters):,} clusters leave {len(validation)} to "
                "score instructions",
                where=KEY,
                fix="Add rows, or measure your own instructions with evaluate.instructions.",
            )
        if 2 * len(validation) > self.settings.max_metric_calls:
            raise UserError(
                f"max_metric_calls must be at least {2 * len(validation)}, two passes over {len(validation)} "
                f"validation rows (got {self.settings.max_metric_calls})",
                where=f"{KEY}.max_metric_calls",
                fix="Raise it, or lower val_items.",
            )
        return feedback, validation

    def estimate(self) -> OptimizePromptEstimate:
        """Estimate the calls, tokens and cost without sending anything."""
        settings, model = self.settings, self.endpoint.config
        # Each proposal takes two minibatches, its parent's and its own; an accepted proposal also
        # takes the validation rows.
        left = settings.max_metric_calls - len(self.validation)
        calls = min(settings.max_reflection_calls, -(-left // settings.minibatch_size))
        row = max(len(task_text(m.example.prompt)) + 2 * len(m.example.output) for m in self.feedback)
        most = _TEMPLATE_CHARACTERS + 4 * len(self.instruction.text) + settings.minibatch_size * (row + 200)
        tokens = calls * estimated_tokens(" " * most)
        limit = model.reply_limit
        return OptimizePromptEstimate(
            reflection_calls=calls,
            metric_calls=settings.max_metric_calls + settings.minibatch_size + len(self.validation),
            dev_answers=(_FINALISTS + 1) * len(self.dev),
            prompt_tokens=tokens,
            most_completion_tokens=None if limit is None else calls * limit,
            most_cost=None if limit is None else cost(model, tokens, calls * limit),
        )

    @property
    def file(self) -> Path:
        """The optimization's file, whether or not it exists."""
        return self.arm_runner.project.prompts / f"{self.identity}.json"

    @property
    def identity(self) -> str:
        """12 hex digits: a digest of everything that decides the optimization."""
        return digest(self._lineage)[:12]

    @property
    def _lineage(self) -> dict[str, Any]:
        settings, model = self.settings, self.endpoint.config
        return {
            **self.arm_runner.inputs,
            "optimizer": _optimizer(),
            "reflection": {"url": model.base_url, "model": model.model, "parameters": model.parameters},
            "limits": settings.model_dump(mode="json", exclude={"reflection_model", "seed"}),
            "optimization_seed": self.seed,
        }

    def run(self) -> OptimizePromptResult:
        """Search, choose on dev and store the result; a stopped run repeats its steps from kept replies and answers."""
        evaluations = self.arm_runner.project.evaluations
        if self.file.exists():
            return OptimizePromptResult(self.file, load_optimized(self.file, evaluations), optimized=False)
        self.endpoint.require_key()
        split = [m.example for m in self.train]
        check_references(self.arm_runner.scorers[:1], split, "train", self.reporter)
        self.reporter.say(
            f"Training rows, the base's answers to them and the references are sent to {self.endpoint.config.model} at "
            f"{self.endpoint.config.base_url}"
        )
        result, adapter = self._search()
        if self._failure is not None:
            raise self._failure
        prompt = self._chosen(result, adapter)
        for note in prompt.notes:
            self.reporter.warn(f"Prompt optimization: {note}")
        store_optimized(self.file, prompt, evaluations)
        return OptimizePromptResult(self.file, prompt, optimized=True)

    def _search(self) -> tuple[GEPAResult[str, int], InstructionAdapter]:
        from gepa.api import optimize

        from tunewright.evaluation.prompt_optimization.gepa_adapter import INSTRUCTION, InstructionAdapter

        settings = self.settings
        with self.reporter.task("Optimizing the prompt", settings.max_metric_calls, "answers") as task:
            examples = [member.example for member in self.train]
            adapter = InstructionAdapter(self.arm_runner, self.instruction, examples, self._ask, task)
            result: GEPAResult[str, int] = optimize(
                seed_candidate={INSTRUCTION: self.instruction.text},
                trainset=self.feedback,
                valset=self.validation,
                # Its proposal is a method here, and an optional attribute in the protocol.
                adapter=cast("GEPAAdapter[Member, dict[str, Any], str]", adapter),
                reflection_minibatch_size=settings.minibatch_size,
                max_metric_calls=settings.max_metric_calls,
                stop_callbacks=[lambda _state: self._end is not None],
                logger=_NoLog(),
                seed=self.seed,
                track_best_outputs=False,
            )
        return result, adapter

    def _ask(self, prompt: str) -> Reply | None:
        """Return the reflection model's reply, or None if the search has to end.

        GEPA continues after an exception, so the reason is kept here.
        """
        if len(self.endpoint.used) >= self.settings.max_reflection_calls:
            self._end = f"max_reflection_calls ({self.settings.max_reflection_calls}) was reached"
            return None
        try:
            return self.endpoint.ask("reflection", [({"role": "user", "content": prompt},)])[0]
        except UserError as error:
            self._end = error.what
            if error.where == _BUDGET and self.endpoint.used:
                self._end = "the budget was used up"
                self.reporter.warn(f"{error.what}. The best instruction so far is kept.")
            else:
                self._failure = error
            return None

    def _chosen(self, result: GEPAResult[str, int], adapter: InstructionAdapter) -> OptimizedPrompt:
        """Let dev choose among the pairs' own instruction and the best candidates on the validation rows."""
        from tunewright.evaluation.prompt_optimization.gepa_adapter import INSTRUCTION

        texts = [candidate[INSTRUCTION] for candidate in result.candidates]
        scores = result.val_aggregate_scores
        # The reflection model may propose an instruction again.
        first = {text: place for place, text in reversed(list(enumerate(texts)))}
        ranked = sorted((place for place in first.values() if place > 0), key=lambda place: -scores[place])
        on_dev = {place: self._on_dev(adapter, texts[place]) for place in [0, *ranked[:_FINALISTS]]}
        dev = {place: score for place, score in on_dev.items() if score is not None}
        best = max(dev, key=lambda place: (dev[place], -place))
        model = self.endpoint.config
        return OptimizedPrompt(
            id=self.identity,
            created=now(),
            optimizer=_optimizer(),
            metric=self.arm_runner.scorers[0].name,
            place=self.instruction.place,
            own=self.instruction.text,
            candidates=tuple(
                PromptCandidate(
                    instruction=text,
                    digest=instruction_digest(text),
                    parents=tuple(parent for parent in result.parents[place] if parent is not None),
                    validation=scores[place],
                    dev=dev.get(place),
                )
                for place, text in enumerate(texts)
            ),
            chosen=best,
            feedback_rows=len(self.feedback),
            validation_rows=len(self.validation),
            dev_items=len(self.dev),
            metric_calls=adapter.metric_calls,
            proposals=adapter.proposals,
            reflection=ReflectionUsage(
                model=str(model.model),
                url=str(model.base_url),
                parameters=model.parameters,
                estimated=self.endpoint.uncounted,
                **asdict(self.endpoint.usage),
            ),
            stopped=self._end or f"max_metric_calls ({self.settings.max_metric_calls:,}) was reached",
            notes=tuple(f"{what} ({count} times)" for what, count in sorted(adapter.gaps.items())),
            lineage=self._lineage,
        )

    def _on_dev(self, adapter: InstructionAdapter, text: str) -> float | None:
        """Return an instruction's zero-shot score on dev; None if its prompts do not fit."""
        try:
            prompts = adapter.prompts(self.dev, text)
        except UserError as error:
            if text == self.instruction.text:
                raise
            adapter.gaps[f"an instruction cannot be used on dev ({error.what})"] += 1
            return None
        with self.reporter.task("A candidate on dev", len(prompts), "answers") as task:
            answers = self.generator.answer("dev", prompts, self.arm_runner.limit)
            task.advance(len(prompts))
        scores = score_all(self.arm_runner.scorers[0], [a.text for a in answers], [m.example for m in self.dev])
        return scores.total()


class _NoLog:
    """GEPA's logger: its lines would go to stdout, and the stored record contains the same facts."""

    def log(self, message: str) -> None:
        """Drop a line."""


def _optimizer() -> str:
    return f"gepa {version('gepa')}"


def _shared_instruction(arm_runner: ArmRunner) -> Instruction:
    try:
        return find_instruction(arm_runner.version.domain)
    except UserError as error:
        raise UserError(
            error.what, where=KEY, fix="Give all pairs the same system turn, or measure them without an optimizer."
        ) from None
