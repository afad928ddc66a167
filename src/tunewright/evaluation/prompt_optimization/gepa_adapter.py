"""GEPA's view of the task: an instruction answers rows, is scored, and is improved by a reflection model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gepa.core.adapter import EvaluationBatch
from gepa.strategies.instruction_proposal import InstructionProposalSignature

from tunewright.core.errors import UserError
from tunewright.core.progress import Task
from tunewright.data.examples import Example
from tunewright.data.versions import Member
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.arms import Instruction
from tunewright.evaluation.generations import Prompt
from tunewright.evaluation.judge.runner import task_text
from tunewright.metrics import score_all
from tunewright.model_io.replies import Reply

INSTRUCTION = "instruction"
"""Name of the only text that GEPA evolves."""

Batch = EvaluationBatch[dict[str, Any], str]


class InstructionAdapter:
    """GEPA's adapter (the protocol `gepa.core.adapter.GEPAAdapter`).

    ``among`` are all training rows, whose outputs for the same input count as references. ``ask`` sends a prompt to the
    reflection model, and returns None once the search has to end.
    """

    def __init__(
        self,
        arm_runner: ArmRunner,
        instruction: Instruction,
        among: Sequence[Example],
        ask: Callable[[str], Reply | None],
        task: Task,
    ) -> None:
        self._arm_runner = arm_runner
        self._instruction = instruction
        self._own = instruction.text
        self._among = among
        self._ask = ask
        self._task = task
        self.metric_calls = 0
        self.proposals = 0
        self.gaps = Counter[str]()

    def evaluate(self, batch: list[Member], candidate: dict[str, str], capture_traces: bool = False) -> Batch:
        """Answer rows with a candidate and score each answer; an answer without a score counts as 0."""
        text = candidate[INSTRUCTION]
        why: str | None = None
        try:
            prompts = self.prompts(batch, text)
        except UserError as error:
            if text == self._own:
                raise
            why = error.what
            self.gaps[f"an instruction cannot be used ({why})"] += 1
        if why is None:
            answers = [a.text for a in self._arm_runner.generator.answer("train", prompts, self._arm_runner.limit)]
            examples = [member.example for member in batch]
            scores = score_all(self._arm_runner.scorers[0], answers, examples, self._among)
            values, unscored = np.nan_to_num(scores.values).tolist(), scores.unscored
        else:
            answers, values, unscored = [""] * len(batch), [0.0] * len(batch), dict.fromkeys(range(len(batch)), why)
        self.metric_calls += len(batch)
        self._task.advance(len(batch))
        traces = [
            {"member": member, "answer": answer, "score": value, "unscored": unscored.get(place)}
            for place, (member, answer, value) in enumerate(zip(batch, answers, values, strict=True))
        ]
        return EvaluationBatch(answers, values, traces if capture_traces else None)

    def prompts(self, members: Sequence[Member], text: str) -> list[Prompt]:
        """Return the zero-shot prompts of rows with an instruction."""
        arm_runner = self._arm_runner
        prompts = [arm_runner.instructed(member, None if text == self._own else text).ids for member in members]
        longest = max(map(len, prompts))
        if longest + arm_runner.limit > arm_runner.context:
            raise UserError(
                f"A prompt of {longest:,} tokens does not fit the base's context of {arm_runner.context:,} with an "
                f"answer of {arm_runner.limit}"
            )
        return prompts

    def make_reflective_dataset(
        self,
        candidate: dict[str, str],  # noqa: ARG002 - the answers are all that the rows show
        eval_batch: Batch,
        components_to_update: list[str],
    ) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Return each row's input, answer and fault, as the reflection model reads them."""
        assert eval_batch.trajectories is not None
        rows = [
            {
                "Inputs": self._input(trace["member"]),
                "Generated Outputs": trace["answer"],
                "Feedback": self._feedback(trace),
            }
            for trace in eval_batch.trajectories
        ]
        return dict.fromkeys(components_to_update, rows)

    def _input(self, member: Member) -> str:
        """Return a row's prompt without its instruction, which the reflection model reads once."""
        messages = member.example.prompt
        if self._instruction.place == "beginning":
            messages = self._instruction.replaced(messages, "")
        return task_text([m for m in messages if m.role != "system"]).strip()

    def _feedback(self, trace: Mapping[str, Any]) -> str:
        reference = trace["member"].example.output
        if trace["unscored"]:
            return f"No score: {trace['unscored']}. The correct answer is: {reference}"
        if trace["score"] >= 1:
            return "The answer is correct."
        name = self._arm_runner.scorers[0].name
        return f"The answer scores {100 * trace['score']:.0f} of 100 by {name}. The correct answer is: {reference}"

    def propose_new_texts(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],  # noqa: ARG002 - there is one
    ) -> dict[str, str]:
        """Return a new instruction by GEPA's own reflection prompt, or nothing if the reply has none."""
        prompt = InstructionProposalSignature.prompt_renderer(
            {
                "current_instruction_doc": candidate[INSTRUCTION],
                "dataset_with_feedback": reflective_dataset[INSTRUCTION],
                "prompt_template": None,
            }
        )
        assert isinstance(prompt, str)  # a list only where rows have images
        reply = self._ask(prompt)
        if reply is None:
            return {}
        if reply.refused or reply.finish == "length":
            self.gaps[f"a reply was {reply.refused or 'cut at its token limit'}"] += 1
            return {}
        text = InstructionProposalSignature.output_extractor(reply.text.strip())["new_instruction"].strip()
        if not text:
            self.gaps["a reply has no instruction"] += 1
            return {}
        self.proposals += 1
        return {INSTRUCTION: text}
