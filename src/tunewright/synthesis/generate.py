"""Ideal outputs for inputs without one: sampled from a teacher, and kept where the samples agree."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_text
from tunewright.core.progress import Reporter
from tunewright.data.examples import Example, Message
from tunewright.data.readers import GENERATED
from tunewright.data.versions import DatasetVersion
from tunewright.evaluation.answer_constraints import AnswerConstraints
from tunewright.metrics import Scorer
from tunewright.model_io.client import Calls, Usage
from tunewright.synthesis.agreement import choose, needs_no_reference, score_of
from tunewright.synthesis.inputs import Input, screen_inputs
from tunewright.synthesis.rubric import JudgeCalls, RubricJudge
from tunewright.synthesis.teachers import Sample, Teacher

DISAGREE = "samples disagree"
FORM = "not in the form of evaluate.structured_outputs"
BELOW = "scores under generate.min_score"
UNDER = "scored under generate.judge_score by the judge"


@dataclass(frozen=True)
class Estimate:
    """The calls of a run before anything is sent; ``left_out`` has the places of inputs by reason.

    ``judge_calls`` is the highest number, since only answers that are kept are judged.
    """

    inputs: int
    left_out: dict[str, list[str]]
    calls: Calls
    judge_calls: int = 0


@dataclass(frozen=True)
class GenerateResult:
    """A file of generated rows, or None if no row was kept.

    ``left_out`` has the place of each input without a row, by reason; ``models`` counts samples by the teacher's
    version.
    """

    out: str | None
    inputs: int
    rows: int
    left_out: dict[str, list[str]]
    models: dict[str, int]
    used: Usage
    judged: JudgeCalls | None

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        return asdict(self)


class RowGenerator:
    """The generation of rows for inputs.

    Args:
        project: its config has the generate section, the metric and the data settings.
        version: the current version, whose held-out rows the inputs must not resemble; None: no dataset yet.
        teacher: writes the samples.
        scorer: the metric that decides.
        constraints: the form that answers must have.
        judge: scores the answers; None: they are not judged.
        reporter: shows progress and warnings.
    """

    def __init__(
        self,
        project: ProjectFolder,
        version: DatasetVersion | None,
        teacher: Teacher,
        scorer: Scorer,
        constraints: AnswerConstraints | None,
        judge: RubricJudge | None,
        reporter: Reporter,
    ) -> None:
        self.project = project
        self.config = project.config.generate
        self.version = version
        self.teacher = teacher
        self.scorer = scorer
        self.constraints = constraints
        self.judge = judge
        self.reporter = reporter

    def estimate(self, inputs: Sequence[Input]) -> Estimate:
        """Return the calls, tokens and cost of :meth:`run`, without sending anything."""
        reasons = screen_inputs(self.project, self.version, inputs, self.reporter)
        prompts = [each.example.prompt for place, each in enumerate(inputs) if place not in reasons]
        calls = self.teacher.calls(prompts, self.config.samples)
        judged = 0 if self.judge is None else len(prompts) + 2 * self.judge.config.controls
        return Estimate(len(inputs), _places(inputs, reasons), calls, judged)

    def run(self, inputs: Sequence[Input], out: Path) -> GenerateResult:
        """Sample the teacher, and write the rows that are kept to a file that ``data add`` reads.

        Raises:
            UserError: the endpoint fails or the budget is used up (finished replies are kept), or ``out`` exists with
                other rows.
        """
        reasons = screen_inputs(self.project, self.version, inputs, self.reporter)
        asked = [place for place in range(len(inputs)) if place not in reasons]
        prompts = [inputs[place].example.prompt for place in asked]
        if self.judge is not None and prompts:
            self.judge.test(self.version)
        samples = self.teacher.sample("generating", prompts, self.config.samples) if prompts else []
        models = Counter(sample.model for each in samples for sample in each)
        warn_of_versions(models, self.reporter)
        kept: dict[int, tuple[Message, float]] = {}
        for place, drawn in zip(asked, samples, strict=True):
            chosen = self._kept(inputs[place], drawn)
            if isinstance(chosen, str):
                reasons[place] = chosen
            else:
                kept[place] = chosen
        scores = self._judged(inputs, kept, reasons)
        rows = [
            self._row(inputs[place], *kept[place], drawn, scores.get(place))
            for place, drawn in zip(asked, samples, strict=True)
            if place not in reasons
        ]
        if rows:
            write_rows(out, rows)
        written = str(out) if rows else None
        left_out = _places(inputs, reasons)
        judged = None if self.judge is None else self.judge.used
        used = self.teacher.used
        return GenerateResult(written, len(inputs), len(rows), left_out, dict(models), used, judged)

    def _judged(
        self, inputs: Sequence[Input], kept: Mapping[int, tuple[Message, float]], reasons: dict[int, str]
    ) -> dict[int, int]:
        """Return the judge's scores, and add a reason for each answer that does not pass."""
        if self.judge is None or not kept:
            return {}
        examples = [Example((*inputs[place].example.prompt, answer)) for place, (answer, _) in kept.items()]
        found: dict[int, int] = {}
        for place, score in zip(kept, self.judge.scores("judging", examples), strict=True):
            if isinstance(score, int):
                found[place] = score
            if not self.judge.passes(score):
                reasons[place] = UNDER if isinstance(score, int) else f"not judged: {score}"
        return found

    def _kept(self, given: Input, samples: Sequence[Sample]) -> tuple[Message, float] | str:
        """Return the chosen answer with its agreement, or the reason why the input gets no row."""
        prompt = given.example.prompt
        unusable = [sample.unusable for sample in samples if sample.unusable is not None]
        usable = [sample.message for sample in samples if sample.message is not None]
        if self.constraints is not None:
            formed = [message for message in usable if self.constraints.allow(Example((*prompt, message)))]
            unusable += [FORM] * (len(usable) - len(formed))
            usable = formed
        if not usable:
            return Counter(unusable).most_common(1)[0][0]
        answer, agreement = choose(self.scorer, prompt, usable, len(samples))
        # Thirds have no exact binary form: 2 of 3 would be under 0.6667.
        if agreement < self.config.agreement - 1e-4:
            return DISAGREE if len(usable) == len(samples) else f"{DISAGREE}, or too few can be used"
        if given.answered or needs_no_reference(self.scorer):
            reference = given.example if given.answered else Example((*prompt, answer))
            score = score_of(self.scorer, reference, answer.text)
            if score is not None and score < self.config.min_score - 1e-9:
                return BELOW
        return answer, agreement

    def _row(
        self, given: Input, answer: Message, agreement: float, samples: Sequence[Sample], score: int | None
    ) -> dict[str, Any]:
        example = Example((*given.example.prompt, answer))
        about = {
            "teacher": self.teacher.name,
            "version": sorted({sample.model for sample in samples}),
            **self.teacher.about,
            "date": max(sample.when for sample in samples)[:10],
            "prompt": digest(
                [given.example.input_key, self.config.instruction, self.config.parameters],
            )[:16],
            "samples": len(samples),
            "agreement": round(agreement, 4),
            **({} if score is None else {"judge": self.project.config.judge.model, "score": score}),
            "license": self.config.license,
            "input": given.place,
        }
        own = {key: value for key, value in given.row.metadata.items() if key not in ("messages", "tools")}
        return {**example.as_row(), **given.row.groups, **own, GENERATED: about}


def warn_of_versions(models: Mapping[str, int], reporter: Reporter) -> None:
    """Warn if the teacher reported several versions; ``models`` counts samples by version."""
    if len(models) > 1:
        counts = ", ".join(f"{name} ({count:,})" for name, count in sorted(models.items()))
        reporter.warn(
            f"The teacher's version changed between samples: {counts}. Each row names the versions of its samples."
        )


def _places(inputs: Sequence[Input], reasons: Mapping[int, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for place, reason in sorted(reasons.items()):
        found.setdefault(reason, []).append(inputs[place].place)
    return dict(sorted(found.items(), key=lambda each: -len(each[1])))


def write_rows(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, unless the file has them already.

    Raises:
        UserError: the file exists with another content, or the disk refuses.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out.exists():
        if out.is_file() and out.read_bytes() == text.encode():
            return
        raise UserError(
            "The file exists and has other rows; all replies are kept",
            where=str(out),
            fix="Name another file with --out, or delete this one. Repeating the command asks for nothing again.",
        )
    write_text(out, text)
