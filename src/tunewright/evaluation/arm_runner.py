"""Measuring arms: their prompts, answers and scores. The callers choose the arms and the rows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tunewright.adapters.lineage import packages
from tunewright.adapters.registry import Adapter
from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_lengths, answer_limit, stop_strings, warn_of_longer_references
from tunewright.config import Config, Quantization
from tunewright.config.project import ProjectFolder
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.core.text import common_prefix
from tunewright.data.examples import Message
from tunewright.data.splits import Split
from tunewright.data.versions import DatasetVersion, Member
from tunewright.evaluation.arms import (
    TUNED,
    ZERO_SHOT,
    ArmPlan,
    Instruction,
    find_instruction,
    find_optimized,
    prompting_arms,
)
from tunewright.evaluation.demonstrations import Demonstrations, Embeddings, with_demonstrations
from tunewright.evaluation.generations import ArmAnswer, ArmPrompts, Generator, Prompt
from tunewright.evidence.common import Budget, NoiseFloor, StoredPrompt
from tunewright.evidence.files import PromptMessages
from tunewright.evidence.prompt_optimization import OptimizedPrompt
from tunewright.evidence.schema import MEASUREMENT_VERSION, Arm
from tunewright.evidence.scoring import ScoredArms, score_arm, score_arms
from tunewright.evidence.statistics import RESAMPLES
from tunewright.metrics import Scorer, Scores, metric_inputs, open_scorers, references_of, score_all
from tunewright.models.bases import Base
from tunewright.models.loading import context_length


@dataclass(frozen=True)
class BuiltPrompt:
    """An arm's prompt for a row, within the base's context."""

    ids: Prompt
    messages: tuple[Message, ...]
    demonstrations: tuple[Member, ...]
    """The demonstrations in the prompt's order."""
    dropped: bool = False
    """True if the prompt has fewer demonstrations than the arm, to fit the context."""

    def stored(self, messages: PromptMessages, plan: str | None = None) -> StoredPrompt:
        """Return the evidence's entry, with its messages among the evaluation's."""
        return StoredPrompt(
            messages=messages.add([replace(message, weight=1).as_dict() for message in self.messages]),
            tokens=digest(self.ids),
            demonstrations=tuple(shown.key for shown in self.demonstrations),
            dropped=self.dropped,
            plan=plan,
        )


class ArmRunner:
    """A dataset version and a base model, with the arms' answers to its rows.

    For a fold, ``folder`` is the place of its advice, and ``limit`` the longest answer in tokens.
    Otherwise they are the project's folder of evaluations and the limit that the training split needs.
    """

    def __init__(
        self,
        project: ProjectFolder,
        version: DatasetVersion,
        generator: Generator,
        reporter: Reporter,
        *,
        folder: Path | None = None,
        limit: int | None = None,
    ) -> None:
        self.project = project
        self.version = version
        self.generator = generator
        self.reporter = reporter
        self.settings = project.config.evaluate
        self.scorers = open_scorers(self.settings, project.root)
        self.folder = project.evaluations if folder is None else folder
        # Generic rows are trained on, but they do not demonstrate the task or indicate the length of its answers.
        self.context = context_length(generator.base)
        self.embeddings = Embeddings(project, generator, self.context)
        self.demonstrations = Demonstrations(version.domain_of("train"), project.config.seed, self.embeddings.of)
        self._limit = limit
        self.budget: Budget | None = None
        """The arms that ``--minutes`` leaves out; None if it leaves out no arm."""
        self._warned_of: set[str] = set()
        self._built: dict[tuple[ArmPlan, str], BuiltPrompt] = {}

    @cached_property
    def limit(self) -> int:
        """The longest answer in tokens."""
        if self._limit is not None:
            return self._limit
        return answer_limit(self.project.config, self.generator.chat, self.version.domain_of("train"))

    def longer_than_limit(self, members: Sequence[Member]) -> int:
        """Return the number of these rows whose reference has more tokens than an answer may have."""
        return sum(n > self.limit for n in answer_lengths(self.generator.chat, [m.example for m in members]))

    def warn_of_longer(self, split: Split) -> None:
        """Warn, once per split, of references longer than the answer limit."""
        if split not in self._warned_of:
            self._warned_of.add(split)
            examples = [m.example for m in self.version.examples(split)]
            warn_of_longer_references(self.generator.chat, examples, self.limit, split, self.reporter)

    def warn_once(self, message: str) -> None:
        """Warn, unless the same warning was given before."""
        if message not in self._warned_of:
            self._warned_of.add(message)
            self.reporter.warn(message)

    @cached_property
    def instruction(self) -> Instruction:
        """The instruction that all pairs share, where evaluate.instructions apply."""
        return find_instruction(self.version.domain)

    @cached_property
    def optimization(self) -> OptimizedPrompt | None:
        """The prompt optimization on this version and base; None for folds, whose test rows it may have seen."""
        project = self.project
        if self.folder != project.evaluations:
            return None
        return find_optimized(project.prompts, project.evaluations, self.inputs, self.reporter)

    @property
    def optimized(self) -> str | None:
        """The digest of the optimized instruction, if there is one."""
        return self.optimization.digest if self.optimization else None

    @property
    def prompting_arms(self) -> list[ArmPlan]:
        """Every arm that needs no training."""
        return prompting_arms(self.settings, self.optimized)

    @property
    def inputs(self) -> dict[str, Any]:
        """Return everything that decides an arm's answers, apart from its adapter."""
        return {
            "dataset": self.version.digest,
            "base": self.generator.base.digest,
            "template": self.generator.chat.digest,
            "dtype": self.generator.dtype,
            "quantization": self.generator.quantization,
            "max_new_tokens": self.limit,
            "stop": self.generator.stop,
            "structured_outputs": self.generator.grammar.rule if self.generator.grammar else None,
            "metrics": [metric_inputs(metric, self.project.root) for metric in self.settings.metrics],
            "seed": self.project.config.seed,
            "schema": MEASUREMENT_VERSION,
            **references_inputs(self.version.domain),
            **self.generator.engine.identity,
        }

    def infeasible_reason(self, plan: ArmPlan, members: Sequence[Member]) -> str | None:
        """Return why this arm cannot answer all of these rows with its number of demonstrations, or None if it can."""
        self.demonstrations.prepare(plan, members)
        fewest = min(len(self.demonstrations.shown(plan, m)) for m in members)
        if fewest < plan.shots:
            return f"the training rows have only {fewest} demonstrations for a question"
        too_long = sum(not self._fits(self._whole_prompt(plan, m).ids) for m in members)
        if too_long:
            return (
                f"{too_long} of {len(members)} prompts do not fit the base's context of {self.context:,} tokens with "
                f"an answer of {self.limit}"
            )
        return None

    def answers(
        self, plan: ArmPlan, members: Sequence[Member], split: str, adapter: Adapter | None = None
    ) -> list[ArmAnswer]:
        """Return one arm's answers to these rows, in order; see :meth:`answer_arms`."""
        return self.answer_arms([(plan, adapter)], members, split)[plan.name]

    def answer_arms(
        self, arms: Sequence[tuple[ArmPlan, Adapter | None]], members: Sequence[Member], split: str
    ) -> dict[str, list[ArmAnswer]]:
        """Return the answers to these rows, in order, by arm; a cluster's workers answer all arms together.

        A prompt that is too long shows fewer demonstrations, with a warning.
        """
        asked = []
        for plan, adapter in arms:
            assert adapter is not None or not plan.adapted
            prompts = self.prompts(plan, members)
            if cut := sum(prompt.dropped for prompt in prompts):
                self.reporter.warn(
                    f"{plan.name} on {split}: {cut} of {len(members)} prompts show fewer demonstrations, to fit the "
                    f"base's context of {self.context:,} tokens with an answer of {self.limit}"
                )
            asked.append(
                ArmPrompts(
                    f"{plan.name} on {split}",
                    [prompt.ids for prompt in prompts],
                    adapter if plan.adapted else None,
                    constrained=plan.constrained,
                )
            )
        answered = self.generator.answer_arms(asked, self.limit)
        return {plan.name: answers for (plan, _), answers in zip(arms, answered, strict=True)}

    def prompts(self, plan: ArmPlan, members: Sequence[Member]) -> list[BuiltPrompt]:
        """Return the prompts of these rows, each with as many demonstrations as fit the context."""
        self.demonstrations.prepare(plan, members)
        return [self._fitting_prompt(plan, member) for member in members]

    def dev_scores(self, adapter: Adapter | None) -> Scores:
        """Score the dev split by the deciding metric, zero-shot, with the adapter or the base alone."""
        plan = ZERO_SHOT if adapter is None else TUNED
        dev = self.version.examples("dev")
        answers = self.answers(plan, dev, "dev", adapter)
        return score_all(self.scorers[0], [a.text for a in answers], [m.example for m in dev])

    def _fitting_prompt(self, plan: ArmPlan, member: Member) -> BuiltPrompt:
        prompt = self._whole_prompt(plan, member)
        shown = prompt.demonstrations
        left = len(shown)
        while not self._fits(prompt.ids) and left:
            left -= 1
            # The least similar demonstrations are dropped first.
            kept = shown[:left] if plan.order == "similar_first" else shown[len(shown) - left :]
            prompt = replace(self._prompt(plan, member, kept), dropped=True)
        if not self._fits(prompt.ids):
            raise UserError(
                f"Row {member.key[:12]} alone makes a prompt of {len(prompt.ids):,} tokens; with an answer of "
                f"{self.limit} it does not fit the base's context of {self.context:,}",
                where="evaluate.max_new_tokens",
                fix="Shorten the row or the answers, or use a base with a longer context.",
            )
        return prompt

    def _fits(self, prompt: Prompt) -> bool:
        return len(prompt) + self.limit <= self.context

    def _whole_prompt(self, plan: ArmPlan, member: Member) -> BuiltPrompt:
        key = (plan, member.key)
        if key not in self._built:
            self._built[key] = self._prompt(plan, member, self.demonstrations.shown(plan, member))
        return self._built[key]

    def _prompt(self, plan: ArmPlan, member: Member, shown: Sequence[Member]) -> BuiltPrompt:
        if plan.optimized is not None:
            assert self.optimization is not None
            return self.instructed(member, self.optimization.instruction, shown)
        text = self.settings.instructions[plan.instruction - 1] if plan.instruction else None
        return self.instructed(member, text, shown)

    def instructed(self, member: Member, text: str | None, shown: Sequence[Member] = ()) -> BuiltPrompt:
        """Return a row's prompt with an instruction in place of the pairs' own (None: theirs)."""
        messages = with_demonstrations(member, shown)
        if text is not None:
            messages = self.instruction.replaced(messages, text)
        return BuiltPrompt(self.generator.prompt(messages), messages, tuple(shown))


def references_inputs(domain: Sequence[Member]) -> dict[str, Any]:
    """Return the additional inputs of a measurement where an input has several outputs, else nothing.

    Single-reference scores, or demonstrations that repeat an input, make a different measurement.
    """
    several = any(len(references) > 1 for references in references_of([m.example for m in domain]))
    return {"references": "all of an input's", "demonstrations": "distinct inputs"} if several else {}


# Parts that advice and evidence share


def scored_arms(
    scorers: Sequence[Scorer],
    members: Sequence[Member],
    answers: Mapping[str, Sequence[ArmAnswer]],
    split: Sequence[Member] | None = None,
) -> ScoredArms:
    """Score every arm's answers to the members once by every metric; ``split`` holds all reference rows."""
    return score_arms(
        scorers,
        [m.example for m in members],
        [m.cluster for m in members],
        {name: [a.text for a in given] for name, given in answers.items()},
        None if split is None else [m.example for m in split],
    )


def measured_arm(
    name: str,
    plan: ArmPlan,
    answers: Sequence[ArmAnswer],
    scored: ScoredArms,
    seed: int,
    resamples: int = RESAMPLES,
) -> Arm:
    """Return one arm's scores; ``answers`` are the scored answers."""
    prompts = [a.prompt for a in answers]
    arm = score_arm(
        name=name,
        kind=plan.kind,
        shots=plan.shots,
        scores=scored.of_arm(name),
        clusters=scored.clusters,
        truncated=sum(a.truncated for a in answers),
        prompt_tokens=sum(map(len, prompts)) / len(prompts),
        seed=seed,
        resamples=resamples,
    )
    # A prefix shared by the first and the last in sorted order is shared by all.
    shared = common_prefix(min(prompts), max(prompts))
    written = sum(a.tokens for a in answers) / len(answers)
    return arm.model_copy(update={**asdict(plan), "shared_tokens": shared, "answer_tokens": written})


def measured_with(
    config: Config, base: Base, chat: ChatFormat, quantization: Quantization, limit: int
) -> dict[str, Any]:
    """Return the lineage entry for the tools of measurement; ``created`` is UTC, ISO 8601."""
    return {
        "created": now(),
        "base": {"spec": base.spec, "digest": base.digest},
        "template_digest": chat.digest,
        "decoding": {
            "greedy": True,
            "max_new_tokens": limit,
            "stop": list(stop_strings(config, chat)),
            "structured_outputs": config.evaluate.structured_outputs.model_dump(mode="json")
            if config.evaluate.structured_outputs
            else None,
            "batch_size": config.evaluate.batch_size,
            "dtype": config.train.dtype,
            "quantization": quantization,
        },
        "packages": packages(quantization),
    }


# The noise floor


MOST_ITEMS = 100
NOISE = "noise floor"


def noise_floor(
    generator: Generator, members: Sequence[Member], prompts: Sequence[Prompt], limit: int, scorer: Scorer, seed: int
) -> NoiseFloor:
    """Have the base answer up to 100 of these items twice, past the journal, in differently composed batches.

    The seed draws the items. Of items with equal prompts, only the first may be drawn.
    """
    draw = random.Random(f"{seed}:noise")
    first_of: dict[Prompt, int] = {}
    for place, prompt in enumerate(prompts):
        first_of.setdefault(prompt, place)
    places = sorted(draw.sample(list(first_of.values()), min(MOST_ITEMS, len(first_of))))
    # Capped at the number of items: otherwise both passes would batch every item with all other items.
    most = min(generator.rows, len(places))
    sizes = most, max(2, most // 2) if most > 1 else 2
    shuffled = draw.sample(places, len(places))
    with generator.rate.arm(NOISE, 2 * len(places)) as advance:
        answers = []
        for order, size in zip((places, shuffled), sizes, strict=True):
            requests = generator.requests([prompts[place] for place in order], limit)
            completions = generator.generate(
                requests,
                lambda _index, _completion: advance(),
                at_once=size,
                # Otherwise the second pass would reuse the first pass's keys and values from vLLM's prefix cache.
                company=f"noise floor, {size} at once",
            )
            answers.append(
                {
                    place: generator.text(prompts[place], completion)
                    for place, completion in zip(order, completions, strict=True)
                }
            )
    first, second = ([given[place] for place in places] for given in answers)
    examples = [members[place].example for place in places]
    among = [member.example for member in members]
    scores = [score_all(scorer, given, examples, among).total() for given in (first, second)]
    return NoiseFloor(
        items=len(places),
        changed=sum(a != b for a, b in zip(first, second, strict=True)),
        score_difference=scores[1] - scores[0],
        how=f"zero-shot by the base in {generator.dtype} with {generator.engine.name}: batches of {sizes[0]}, then of "
        f"{sizes[1]} in another order",
    )
