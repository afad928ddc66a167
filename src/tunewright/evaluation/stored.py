"""Verbs on stored evaluations: human evaluation, judge, evidence and prompts.

An evaluation is given as its number, ID, folder or evidence file; None is the newest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.lineage import Trace, trace
from tunewright.adapters.registry import Adapter, TrustStatus, find_adapter, trust_status
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.data.examples import Example, Message
from tunewright.data.versions.files import has_rows, read_rows
from tunewright.evaluation.access_log import AccessLog, amendable, load_checked
from tunewright.evidence.common import StoredPrompt
from tunewright.evidence.files import EVIDENCE_FILE, PROMPTS_FILE, find_evaluation, load_items, load_messages
from tunewright.evidence.logged_access import LoggedAccess
from tunewright.evidence.schema import Evidence, Item
from tunewright.evidence.verdict import Decision, verdict
from tunewright.open_project import OpenProject

if TYPE_CHECKING:
    from tunewright.chat.inspection import TokenView
    from tunewright.evaluation.human_eval.session import BlindReview, ComparisonProgress
    from tunewright.evaluation.judge.questions import JudgedItem
    from tunewright.evaluation.judge.runner import Judge, JudgeEstimate, JudgeResult
    from tunewright.evaluation.stored_answers import KeptPreferences, RowAnswers
    from tunewright.evidence.human_eval import AnswerReview


def human_eval(
    project: OpenProject,
    evaluation: str | Path | None = None,
    *,
    reviewer: str | None = None,
    items: int | None = None,
    against: str | None = None,
) -> BlindReview:
    """Return a blind review of an evaluation's answers, resumed where its reviewer stopped.

    Args:
        evaluation: number, ID, folder or evidence file (None: the newest).
        reviewer: the reviewer's name (None: git's user.name, or the login name).
        items: size of the sample, if none has been drawn yet (None: 50).
        against: incumbent whose answers are compared with the tuned ones (None: the best prompting arm's).

    Raises:
        UserError: no evaluation, no incumbent of that name, no reviewer's name, or a sample of another size exists.
            Also if a file of the evaluation was changed after it was written.
    """
    from tunewright.data.review.session import reviewer_name
    from tunewright.evaluation.human_eval.session import BlindReview

    folder = folder_of(evaluation_folder(project, evaluation, dev=False))
    load_checked(folder, project.folder.evaluations, project.reporter)
    name = reviewer_name(reviewer, project.folder.root)
    return BlindReview(folder, name, project.reporter, items=items, against=against)


def human_eval_progress(project: OpenProject, evaluation: str | Path | None = None) -> list[ComparisonProgress]:
    """Return each reviewer's progress on an evaluation, by comparison; it says nothing about the verdicts.

    Raises:
        UserError: no evaluation, or a file of the review was changed.
    """
    from tunewright.evaluation.human_eval.session import reviewers_progress

    return reviewers_progress(folder_of(evaluation_folder(project, evaluation, dev=False)))


def row_answers(project: OpenProject, *, newest: int = 5) -> RowAnswers:
    """Return the adapter's stored answers to rows, from the ``newest`` evaluations. Nothing is generated."""
    from tunewright.evaluation.stored_answers import evaluated_files, row_answers

    evaluations = project.folder.evaluations
    return row_answers(evaluated_files(evaluations)[:newest], evaluations, project.reporter)


def human_eval_results(
    project: OpenProject, evaluation: str | Path | None = None, *, against: str | None = None
) -> AnswerReview:
    """Add all reviewers' verdicts to the evidence and return them: preference, agreement, estimate for all items.

    A judge of the same evaluation is compared with the reviewers and sharpens their estimate. Results against an
    incumbent have a section of their own, which decides nothing.

    Args:
        evaluation: number, ID, folder or evidence file (None: the newest).
        against: incumbent of the comparison (None: the best prompting arm).

    Raises:
        UserError: no evaluation, no incumbent of that name, or no reviews. Also if a file of the evaluation was
            changed after it was written.
    """
    from tunewright.evaluation.human_eval.results import accepted_judge, review_results

    log, folder = amendable(evaluation_folder(project, evaluation, dev=False), project.folder.evaluations)
    evidence = log.load(folder)
    if against is not None:
        section = review_results(folder, against=against)
        known = evidence.human_eval_incumbents
        if known.get(against) != section:
            log.amend(folder, human_eval_incumbents={**known, against: section})
        return section
    section = review_results(folder, accepted_judge(folder, evidence, project.reporter))
    if evidence.human_eval != section:
        log.amend(folder, human_eval=section)
    return section


def keep_preferences(
    project: OpenProject, evaluation: str | Path | None = None, *, source: Literal["person", "judge"]
) -> KeptPreferences:
    """Keep an evaluation's preferences with the dataset as pairs for preference tuning.

    Args:
        evaluation: number, ID, folder or evidence file (None: the newest).
        source: people's blind verdicts, or the judge's where both orders agree.

    Raises:
        UserError: nothing was judged, the judge failed its controls, or a file of the evaluation was changed.
    """
    from tunewright.evaluation.stored_answers import keep_preferences

    folder = folder_of(evaluation_folder(project, evaluation, dev=False))
    return keep_preferences(project.folder.dataset, project.folder.evaluations, folder, source, project.reporter)


def access_log(project: OpenProject) -> list[LoggedAccess]:
    """Return every access to the test split, oldest first, after checking the log and the files that it binds.

    Raises:
        UserError: a line or an evaluation's file was changed or is missing; the first fault is named.
    """
    log = AccessLog(project.folder.evaluations)
    log.require_all()
    return log.openings


def judge(project: OpenProject, evaluation: str | Path | None = None) -> JudgeResult:
    """Let the config's judge compare the tuned answers with the best prompting arm's.

    The judge is tested first. If it fails its controls, its judgements are discarded and the evidence says so.

    Raises:
        UserError: no judge in the config, too few items to test it, or the endpoint fails.
    """
    return _judge(project, evaluation).judge()


def judged_items(project: OpenProject, evaluation: str | Path | None = None) -> list[JudgedItem]:
    """Return each judged item of an evaluation: the judge's verdicts and its replies.

    Raises:
        UserError: as :meth:`verdict`, or nothing was judged.
    """
    from tunewright.evaluation.judge.questions import load_judged

    checked_evidence(project, evaluation)  # which also checks the file of the judged items
    return load_judged(folder_of(evaluation_folder(project, evaluation)))


def estimate_judge(project: OpenProject, evaluation: str | Path | None = None) -> JudgeEstimate:
    """Return the calls, tokens and cost of :meth:`judge` without sending anything."""
    return _judge(project, evaluation).estimate()


def _judge(project: OpenProject, evaluation: str | Path | None) -> Judge:
    from tunewright.evaluation.judge.runner import Judge

    return Judge(project.folder, evaluation_folder(project, evaluation, dev=False), project.reporter)


def evaluation_folder(project: OpenProject, evaluation: str | Path | None = None, *, dev: bool = True) -> Path:
    """Return an evaluation's folder.

    Args:
        evaluation: number, ID, folder or evidence file (None: the newest).
        dev: let the newest be an evaluation on the dev split.

    Raises:
        UserError: no such evaluation, or a line of the access log was changed or is missing.
    """
    if evaluation is None:
        AccessLog(project.folder.evaluations)  # completes an interrupted write, which may be the newest
    return find_evaluation(project.folder.evaluations, evaluation, dev=dev)


def evidence(project: OpenProject, evaluation: str | Path | None = None) -> tuple[Evidence, list[Item]]:
    """Return an evaluation's evidence and its items, checked against the access log.

    Raises:
        UserError: as :meth:`verdict`.
    """
    evidence = checked_evidence(project, evaluation)
    return evidence, load_items(folder_of(evaluation_folder(project, evaluation)))


@dataclass(frozen=True)
class ArmPrompt:
    """The prompt of one arm for an item, or the reason why it is missing."""

    arm: str
    messages: Sequence[Mapping[str, Any]] = ()
    """In the form of OpenAI's API; the functions are a first message of the role ``tools``."""
    tokens: Sequence[TokenView] = ()
    """Empty for a hosted model, and if the base or the chat template has changed since the evaluation."""
    hosted: bool = False
    demonstrations: Sequence[tuple[str, Example | None]] = ()
    """Pair keys in the prompt's order, with the rows that the dataset still has."""
    dropped: bool = False
    """Demonstrations were dropped because they did not fit the base's context."""
    missing: str | None = None
    """The reason why no prompt can be shown."""
    own: str = ""
    """The arm that the item's fold chose in the place of ``arm``; empty: there is no fold, or all chose the same."""


def item_prompts(project: OpenProject, evaluation: str | Path | None, key: str) -> list[ArmPrompt]:
    """Return each arm's prompt for one item, as it was stored when the arm answered; free arms have none.

    Args:
        evaluation: number, ID, folder or evidence file (None: the newest).
        key: the item's pair key.

    Raises:
        UserError: as :meth:`verdict`, or no such item.
    """
    found, items = evidence(project, evaluation)
    messages = load_messages(folder_of(evaluation_folder(project, evaluation)))
    item = next((each for each in items if each.key == key), None)
    if item is None:
        raise UserError(f"The evaluation has no item {key[:12]!r}", where=found.id)
    if item.prompts is None:
        missing = "An earlier version of tunewright wrote this evaluation, and stored no prompts."
        return [ArmPrompt(arm.name, missing=missing) for arm in found.arms]
    if messages is None:
        missing = f"The prompts were deleted: {PROMPTS_FILE} is not in the evaluation's folder."
        return [ArmPrompt(arm.name, missing=missing) for arm in found.arms]
    return [
        _arm_prompt(project, found, arm.name, item.prompts[arm.name], messages)
        if arm.name in item.prompts
        else ArmPrompt(arm.name, missing="The model gave no answer to this item.")
        for arm in found.arms
        if arm.kind != "free"
    ]


def _arm_prompt(
    project: OpenProject, found: Evidence, arm: str, stored: StoredPrompt, messages: Sequence[Mapping[str, Any]]
) -> ArmPrompt:
    if max(stored.messages, default=0) > len(messages):
        return ArmPrompt(arm, missing=f"{PROMPTS_FILE} no longer contains all messages of this prompt.")
    turns = [messages[number - 1] for number in stored.messages]
    rows = project.folder.dataset / "rows"
    shown = read_rows(rows, has_rows(rows, stored.demonstrations))
    return ArmPrompt(
        arm,
        turns,
        _prompt_tokens(project, found, stored.tokens, turns),
        hosted=stored.tokens is None,
        demonstrations=[(key, shown.get(key)) for key in stored.demonstrations],
        dropped=stored.dropped,
        own=stored.plan or "",
    )


def _prompt_tokens(
    project: OpenProject, found: Evidence, stored: str | None, turns: Sequence[Mapping[str, Any]]
) -> Sequence[TokenView]:
    """Return the tokens of messages, if they are the tokens that the model was given."""
    from tunewright.chat.inspection import view
    from tunewright.chat.rendering import Tokens

    if stored is None:
        return ()
    try:
        here = project.base.digest, project.chat.digest
    except UserError:  # the base is not on this machine
        return ()
    if here != (found.lineage["base"]["digest"], found.lineage["template_digest"]):
        return ()
    ids = project.chat.prompt([Message.from_dict(turn) for turn in turns])
    return view(project.chat, Tokens(ids, (False,) * len(ids))) if digest(ids) == stored else ()


def checked_evidence(project: OpenProject, evaluation: str | Path | None) -> Evidence:
    """Return an evaluation's evidence, checked against the access log."""
    if evaluation is None:
        access_log(project)  # a changed time could hide which evaluation is the newest
    place = evaluation_folder(project, evaluation)
    evidence = load_checked(place, project.folder.evaluations, project.reporter)
    if evaluation is None:
        log = AccessLog(project.folder.evaluations)
        for removed in log.removed_since(str(evidence.lineage.get("created", ""))):
            project.reporter.warn(
                f"The evidence of evaluation {removed} is missing. {evidence.id}, which is older, is used instead."
            )
    return evidence


def folder_of(evaluation: Path) -> Path:
    """Return the folder of an evaluation that was given as its evidence file."""
    return evaluation if evaluation.is_dir() else evaluation.parent


# Of an adapter


@dataclass(frozen=True)
class AdapterDetails:
    """An adapter with its lineage, trust status and evaluation verdicts."""

    trace: Trace
    standing: TrustStatus
    verdicts: tuple[tuple[str, Decision], ...]
    """Evaluation IDs with their decisions, newest last."""

    def as_dict(self, *, rows: bool) -> dict[str, Any]:
        """Return the result as ``--json`` prints it, optionally with the rows' keys."""
        evaluations = [{"id": name, "decision": decision} for name, decision in self.verdicts]
        return {**self.trace.as_dict(rows=rows), "standing": self.standing, "evaluations": evaluations}


def show_adapter(project: OpenProject, adapter: str | None = None) -> AdapterDetails:
    """Return an adapter's lineage down to the rows, its trust status and its verdicts.

    Raises:
        UserError: no such adapter.
    """
    found = find_adapter(project.folder.adapters, adapter)
    return AdapterDetails(
        trace(found, project.folder.dataset),
        trust_status(found, TrustedKeys(project.folder.keys)),
        tuple(_verdicts(project, found)),
    )


def _verdicts(project: OpenProject, adapter: Adapter) -> Sequence[tuple[str, Decision]]:
    """Return the decision of each evaluation of the adapter; skip unreadable or changed evidence with a warning."""
    found = []
    for path in project.folder.evaluations.glob(f"*/{EVIDENCE_FILE}"):
        try:
            evidence = AccessLog(project.folder.evaluations).load(path.parent)
        except UserError as error:
            project.reporter.warn(f"{path.parent.name} is skipped: {error.what.splitlines()[0]}")
            continue
        if evidence.lineage.get("adapter", {}).get("digest") == adapter.digest:
            found.append((str(evidence.lineage["created"]), evidence.id, verdict(evidence).decision))
    return [(name, decision) for _, name, decision in sorted(found)]
