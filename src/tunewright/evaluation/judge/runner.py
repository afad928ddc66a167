"""Judging an evaluation: the cost estimate, the controls, and the verdicts if the controls pass."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from tunewright.config.project import ProjectFolder
from tunewright.core.clock import now, without_milliseconds
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.examples import Message
from tunewright.data.versions import load_version, short
from tunewright.evaluation.access_log import amendable
from tunewright.evaluation.judge.figures import (
    control_cases,
    judged_arm,
    judged_contrast,
    measured_controls,
    preference,
    veto,
)
from tunewright.evaluation.judge.questions import (
    CONTROLS_FILE,
    ROWS_FILE,
    ControlRow,
    JudgedAnswers,
    JudgedItem,
    JudgeQuestion,
    JudgeRequests,
    Vote,
    prompts_digest,
    vote,
)
from tunewright.evidence.common import Part
from tunewright.evidence.files import load_items
from tunewright.evidence.judge import Control, Judgement, JudgeUsage
from tunewright.evidence.schema import Evidence, Item
from tunewright.model_io.client import Calls, Endpoint
from tunewright.model_io.replies import Budget, Conversation

REFERENCE_MODEL = "reference model"
"""The reference model's name among the arms."""

_MISSING = "no answer of the reference model"
_Number = TypeVar("_Number", int, float)

_IDENTITY = ("model", "url", "parameters", "prompts", "reference_model")
"""Fields that identify a judgement when it is repeated."""
_FAMILIES = {
    "smollm": r"smol-?lm|smolvlm",
    "mistral": r"mistral|mixtral|ministral|codestral|devstral|magistral|pixtral|mathstral|zephyr",
    "llama": r"llama|vicuna|alpaca",
}


def test_prompts(dataset: Path, evidence: Evidence, items: Sequence[Item]) -> list[Conversation]:
    """Return each item's chat prompt: its messages up to the answer, the system prompt included."""
    messages = _messages(dataset, evidence)
    odd = [item.key for item in items if any(m.role == "tools" for m in messages[item.key])]
    if odd:
        raise UserError(
            f"{len(odd):,} of {len(items):,} test items have functions (the first is {short(odd[0])}), which are not "
            "sent to a reference model",
            where="judge.reference_model",
            fix="Give its answers in a file: judge.reference_model.answers.",
        )
    return [tuple({"role": m.role, "content": m.content} for m in messages[item.key]) for item in items]


def with_tasks(dataset: Path, evidence: Evidence, items: Sequence[Item], reporter: Reporter) -> list[Item]:
    """Return the items with the system prompt in their input, or unchanged if the dataset is missing."""
    try:
        messages = _messages(dataset, evidence)
    except UserError as error:
        reporter.warn(
            f"The judge gets each item's input without a system prompt, since the rows are not here ({error.what}); "
            "describe the task in judge.criteria."
        )
        return list(items)
    return [item.model_copy(update={"input": task_text(messages[item.key])}) for item in items]


def task_text(messages: Sequence[Message]) -> str:
    """Return a prompt as one text, with speakers named where they are not obvious."""
    if [message.role for message in messages if message.role != "system"] == ["user"]:
        return "\n\n".join(message.content for message in messages)
    return "\n\n".join(f"{message.role.capitalize()}: {message.text}" for message in messages)


def _messages(dataset: Path, evidence: Evidence) -> dict[str, tuple[Message, ...]]:
    version = load_version(dataset, str(evidence.lineage["dataset"]))
    return {member.key: member.example.prompt for member in version.domain}


def family(model: str) -> str | None:
    """Return the family that a model's name indicates (smollm, mistral or llama, for example), or None."""
    name = model.lower()
    return next((name_of for name_of, words in _FAMILIES.items() if re.search(words, name)), None)


def shared_family(judge: str, base: str) -> str | None:
    """Return the family of both models, if they have the same one.

    Judges favour text that they find likely themselves (Wataoka et al. 2024, arXiv 2410.21819). The untuned base of
    their family writes such text.
    """
    found = family(judge)
    return found if found is not None and found == family(base) else None


def warn_of_family(judge: str, base: str, reporter: Reporter) -> str | None:
    """Warn of a judge of the base's family, and return that family."""
    shared = shared_family(judge, base)
    if shared is not None:
        reporter.warn(
            f"The judge {judge} belongs to the base's family ({shared}): judges favour text as they would write it "
            "themselves, and the untuned base writes such text. Take one of another family."
        )
    return shared


@dataclass(frozen=True)
class JudgeResult:
    """The result of `judge`."""

    folder: Path
    evidence: Evidence
    judgement: Judgement


@dataclass(frozen=True)
class JudgeEstimate:
    """The requests, tokens and cost of replies that are not stored yet; tokens are guessed from characters."""

    controls: int
    questions: int
    reference_answers: int
    known: int
    prompt_tokens: int
    most_completion_tokens: int | None
    """None: the parameters set no limit."""
    most_cost: float | None
    """None: no prices, or no limit on replies."""


def total_estimate(controls: int, questions: int, estimates: Sequence[Calls]) -> JudgeEstimate:
    """Return the estimate of these questions; ``estimates`` are the judge's calls and then those of other models."""
    return JudgeEstimate(
        controls=controls,
        questions=questions,
        reference_answers=sum(each.calls for each in estimates[1:]),
        known=sum(each.known for each in estimates),
        prompt_tokens=sum(each.prompt_tokens for each in estimates),
        most_completion_tokens=_total([each.most_completion_tokens for each in estimates]),
        most_cost=_total([each.most_cost for each in estimates]),
    )


class Judge:
    """One evaluation and the config's judge."""

    def __init__(self, project: ProjectFolder, folder: Path, reporter: Reporter) -> None:
        self.settings = project.config.judge
        self.settings.require()
        self.project = project
        self.reporter = reporter
        self.access_log, self.folder = amendable(folder, project.evaluations)
        self.evidence = self.access_log.load(self.folder)
        self.items = with_tasks(project.dataset, self.evidence, load_items(self.folder), reporter)
        self.treatment = self.evidence.contrasts[0].treatment
        self.control = self.evidence.contrasts[0].control
        self.cases = control_cases(self.items, self.settings.controls, project.config.seed, self.settings.criteria)
        purse, journals = Budget(self.settings.budget, "judge.budget"), project.work / "judge"
        self.endpoint = Endpoint(self.settings, "judge", journals, purse, reporter)
        self.other: Endpoint | None = None
        reference = self.settings.reference_model
        if reference is not None and reference.base_url is not None:
            self.other = Endpoint(reference, "judge.reference_model", journals, purse, reporter)
        self._file_answers: ReferenceAnswers | None = None
        if reference is not None and reference.answers is not None:
            self._file_answers = read_answers(project.root / reference.answers, self.items)

    def estimate(self) -> JudgeEstimate:
        """Estimate calls, tokens and cost without sending anything."""
        prompts = self._test_prompts()
        controls = {q for case in self.cases for q in case.questions}
        questions = set(self._ballot(self._expected_answers(prompts)).questions) - controls
        estimates = [self.endpoint.estimate(map(conversation, (*controls, *questions)))]
        if self.other is not None:
            estimates.append(self.other.estimate(prompts))
        return total_estimate(len(controls), len(questions), estimates)

    def _expected_answers(self, prompts: Sequence[Conversation]) -> ReferenceAnswers | None:
        """Return the reference model's answers, or placeholders of the references' length for missing ones."""
        if self.other is None:
            return self._file_answers
        if all(map(self.other.is_known, prompts)):
            return asked_answers(self.other, prompts, self.items, self.reporter)
        return ReferenceAnswers({item.key: "?" * len(item.reference) for item in self.items}, {})

    def judge(self) -> JudgeResult:
        """Test the judge and, if it passes, judge all items; the evidence gets the findings or the veto."""
        base = str(self.evidence.lineage["base"]["spec"])
        family = warn_of_family(str(self.settings.model), base, self.reporter)
        self.reporter.say(f"Test items and answers are sent to {self.settings.model} at {self.settings.base_url}")
        votes = self._votes("Testing the judge", [q for case in self.cases for q in case.questions])
        cases = [case.row([votes[question] for question in case.questions]) for case in self.cases]
        controls = measured_controls(cases)
        vetoed = veto(controls)
        if vetoed:
            return self._store(self._judgement(family, controls, vetoed), cases, [])
        prompts, other = self._test_prompts(), self._file_answers
        if self.other is not None:
            other = asked_answers(self.other, prompts, self.items, self.reporter)
        ballot = self._ballot(other)
        votes = self._votes("Judging", ballot.questions)
        rows = ballot.count(votes.__getitem__)
        return self._store(self._findings(self._judgement(family, controls, ()), ballot, rows), cases, rows)

    def _votes(self, title: str, questions: Sequence[JudgeQuestion]) -> dict[JudgeQuestion, Vote]:
        asked = list(dict.fromkeys(questions))
        replies = self.endpoint.ask(title, [conversation(question) for question in asked])
        return {question: vote(question, reply) for question, reply in zip(asked, replies, strict=True)}

    def _test_prompts(self) -> list[Conversation]:
        return [] if self.other is None else test_prompts(self.project.dataset, self.evidence, self.items)

    def _ballot(self, other: ReferenceAnswers | None) -> JudgeRequests:
        arms = (self.treatment, self.control)
        candidates = []
        for item in self.items:
            answers, lacking = {arm: item.answers[arm] for arm in arms}, {}
            if other is not None and item.key in other.answers:
                answers[REFERENCE_MODEL] = other.answers[item.key]
            elif other is not None:
                lacking[REFERENCE_MODEL] = other.lacking[item.key]
            candidates.append(JudgedAnswers(item, answers, lacking))
        opponents = [self.control] if other is None else [self.control, REFERENCE_MODEL]
        return JudgeRequests(candidates, self.treatment, opponents, self.settings.criteria)

    def _judgement(self, family: str | None, controls: tuple[Control, ...], vetoed: tuple[str, ...]) -> Judgement:
        reference = self.settings.reference_model
        return Judgement(
            model=str(self.settings.model),
            url=str(self.settings.base_url),
            parameters=self.settings.parameters,
            prompts=prompts_digest(self.settings.criteria),
            criteria=self.settings.criteria,
            created=now(),
            same_family=family,
            reference_model=None if reference is None else reference.model or reference.answers,
            controls=controls,
            vetoed=vetoed,
            spent=_spent(self.endpoint),
            reference_spent=None if self.other is None else _spent(self.other),
        )

    def _findings(self, judgement: Judgement, ballot: JudgeRequests, rows: Sequence[JudgedItem]) -> Judgement:
        seed, clusters = self.project.config.seed, [item.cluster for item in self.items]
        arms, preferences = [], []
        for arm in (self.treatment, *ballot.opponents):
            verdicts = [row.correctness[arm] for row in rows]
            require_some([v.unscored for v in verdicts], f"the answers of {arm}")
            arms.append(judged_arm(arm, verdicts, clusters))
        for opponent in ballot.opponents:
            require_some([row.pairs[opponent].plain.unscored for row in rows], f"{self.treatment} against {opponent}")
            lengths = {
                each.item.key: (len(each.answers[self.treatment]), len(each.answers.get(opponent, "")))
                for each in ballot.candidates
            }
            preferences.append(preference(self.treatment, opponent, rows, lengths, clusters, seed))
        return judgement.model_copy(
            update={
                "arms": tuple(arms),
                "contrast": judged_contrast(self.treatment, self.control, rows, clusters, seed),
                "preferences": tuple(preferences),
                "spent": _spent(self.endpoint),
            }
        )

    def _store(self, judgement: Judgement, cases: Sequence[ControlRow], rows: Sequence[JudgedItem]) -> JudgeResult:
        """Write the rows together with the evidence, which refers to them. A vetoed judge leaves none."""
        judgement = judgement.model_copy(update={"replaced": _replaced(self.evidence.judge, judgement)})
        files = {CONTROLS_FILE: _lines(cases), **({} if judgement.vetoed else {ROWS_FILE: _lines(rows)})}
        evidence = self.access_log.amend(self.folder, files, judge=judgement)
        if judgement.vetoed:
            (self.folder / ROWS_FILE).unlink(missing_ok=True)
        return JudgeResult(self.folder, evidence, judgement)


def conversation(question: JudgeQuestion) -> Conversation:
    """Return the messages of a question."""
    # All in the user's turn: some templates refuse a system turn.
    return ({"role": "user", "content": question.text},)


def require_some(unscored: Sequence[str | None], what: str) -> None:
    """Check that some verdict could be read; ``unscored`` are the reasons for missing ones."""
    if all(unscored):
        reasons = ", ".join(sorted({reason for reason in unscored if reason}))
        raise UserError(
            f"No verdict on {what} could be read ({reasons})",
            where="judge.model",
            fix="Raise its token limit (judge.parameters), or use another judge.",
        )


def _replaced(earlier: Judgement | None, new: Judgement) -> tuple[str, ...]:
    """Return the earlier judgements that this one replaces, so that judge shopping stays visible."""
    if earlier is None:
        return ()
    if all(getattr(earlier, name) == getattr(new, name) for name in _IDENTITY):
        return earlier.replaced
    summary = f"{earlier.model}, {without_milliseconds(earlier.created)}{', vetoed' if earlier.vetoed else ''}"
    return (*earlier.replaced, summary)


def _spent(endpoint: Endpoint) -> JudgeUsage:
    return JudgeUsage(estimated=endpoint.uncounted, **asdict(endpoint.usage))


def _lines(rows: Sequence[Part]) -> str:
    return "".join(f"{row.model_dump_json()}\n" for row in rows)


def _total(numbers: Sequence[_Number | None]) -> _Number | None:
    """Return the sum, or None if a number is unknown."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


@dataclass(frozen=True)
class ReferenceAnswers:
    """The answers by pair key, and the reason for each item without an answer."""

    answers: Mapping[str, str]
    lacking: Mapping[str, str]


def asked_answers(
    endpoint: Endpoint, prompts: Sequence[Conversation], items: Sequence[Item], reporter: Reporter
) -> ReferenceAnswers:
    """Return the endpoint's answers to the prompts, which are in the items' order."""
    replies = endpoint.ask("Answers of the reference model", prompts)
    cut = sum(reply.finish == "length" for reply in replies)
    if cut:
        reporter.warn(
            f"{cut} of {len(replies)} answers of the reference model ran into its token limit and are judged as they "
            "are; raise max_tokens in judge.reference_model.parameters."
        )
    answered = list(zip(items, replies, strict=True))
    return ReferenceAnswers(
        {item.key: reply.text for item, reply in answered if reply.refused is None},
        {item.key: f"{_MISSING}: {reply.refused}" for item, reply in answered if reply.refused is not None},
    )


def read_answers(path: Path, items: Sequence[Item]) -> ReferenceAnswers:
    """Load the items' answers from a JSONL file of ``{"key": PAIR KEY, "answer": TEXT}``; other keys are ignored."""
    where = "judge.reference_model.answers"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", where=where) from None
    answers: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            key, answer = row["key"], row["answer"]
        except (ValueError, KeyError, TypeError):
            key = answer = None
        if not isinstance(key, str) or not isinstance(answer, str):
            raise UserError('Expected {"key": PAIR KEY, "answer": TEXT}', where=f"{path}:{number}")
        if key in answers:
            raise UserError(f"Duplicate key {key[:12]}", where=f"{path}:{number}")
        answers[key] = answer
    missing = [item.key for item in items if item.key not in answers]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(items)} test items have no answer (first: {missing[0]})",
            where=str(path),
            fix="Use the pair keys of the evaluation's items.jsonl.",
        )
    return ReferenceAnswers({item.key: answers[item.key] for item in items}, {})
