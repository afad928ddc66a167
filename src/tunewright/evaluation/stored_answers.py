"""Preference pairs from an evaluation's judged answers, for preference tuning: kept with the dataset.

People's verdicts are blind and show a preference; a judge's verdicts agree in both orders. Pairs of test
and dev items are kept but never trained on; pairs of a cross-validation come from rows of all splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of
from tunewright.data.versions import Member, load_version, locked
from tunewright.data.versions.logs import KEPT_PAIRS_FILE, KeptPair, read_removals, replace_kept_pairs
from tunewright.evaluation.access_log import load_checked
from tunewright.evaluation.human_eval.results import preferences
from tunewright.evaluation.human_eval.sample import FOLDER, comparison, load_sample
from tunewright.evaluation.human_eval.session import read_journal, read_journals
from tunewright.evaluation.judge.questions import load_judged
from tunewright.evidence.files import EVIDENCE_FILE, ITEMS_FILE, load_items
from tunewright.evidence.schema import Evidence, Item

PreferenceSource = Literal["person", "judge"]
_FLIPPED = "the two orders disagree"
_TIE = "no preference"
_UNSCORED = "no verdict"


@dataclass(frozen=True)
class KeptPreferences:
    """Pairs of one evaluation, now kept with the dataset."""

    file: Path
    kept: int
    """Pairs of this evaluation that are kept."""
    new: int
    """Pairs among these that were not kept before."""
    splits: dict[str, int]
    """Split of their inputs in the current version to number; "none": the version has no such row."""
    left_out: dict[str, int]
    """Reason to number of judged items without a pair."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        return {**asdict(self), "file": str(self.file)}


@dataclass(frozen=True)
class _Verdict:
    """One rater's preference on an item: the treatment (1) or the control (-1); or the reason for having none."""

    key: str
    arms: tuple[str, str]
    """Treatment and control."""
    preferred: int
    by: str
    when: str
    why_not: str = ""


def keep_preferences(
    dataset: Path, evaluations: Path, folder: Path, source: PreferenceSource, reporter: Reporter
) -> KeptPreferences:
    """Keep the pairs of an evaluation's people or judge; pairs of an earlier call are replaced."""
    evidence = load_checked(folder, evaluations, reporter)
    verdicts = list(_people(folder, evidence) if source == "person" else _judge(folder, evidence))
    items = {item.key: item for item in load_items(folder)}
    evaluated = load_version(dataset, str(evidence.lineage["dataset"]), without_purged=True)
    members = {member.key: member for member in evaluated.members}
    left_out: Counter[str] = Counter()
    pairs: list[KeptPair] = []
    with locked(dataset):
        purged = read_removals(dataset).purged
        for verdict in verdicts:
            why_not = verdict.why_not or _unusable(verdict, items, members, purged)
            if why_not:
                left_out[why_not] += 1
            else:
                pairs.append(_pair(verdict, items[verdict.key], members[verdict.key], evidence, source))
        pairs.sort(key=lambda pair: (pair.key, pair.by))
        new = replace_kept_pairs(dataset, evidence.id, source, pairs)
    for reason, count in left_out.items():
        reporter.say(f"{count_of(count, 'judged item')} without a pair: {reason}")
    split_of = {member.example.input_key: member.split for member in load_version(dataset).domain}
    splits = Counter(split_of.get(pair.input, "none") for pair in pairs)
    if outside := sum(count for split, count in splits.items() if split != "train"):
        reporter.warn(
            f"{outside:,} of {count_of(len(pairs), 'pair')} are of inputs outside the training split: training never "
            "uses them."
        )
    return KeptPreferences(dataset / KEPT_PAIRS_FILE, len(pairs), new, dict(splits), dict(left_out))


def _unusable(verdict: _Verdict, items: dict[str, Item], members: dict[str, Member], purged: dict[str, Any]) -> str:
    """Return the reason why a preference makes no pair; empty if it does."""
    if verdict.key in purged or verdict.key not in members or verdict.key not in items:
        return "the row was purged"
    if any(message.role == "tools" for message in members[verdict.key].example.prompt):
        return "its answers may be function calls, of which evidence keeps the text alone"
    texts = [items[verdict.key].answers[arm].strip() for arm in verdict.arms]
    if not all(texts):
        return "an answer is empty"
    return "both answers are equal" if texts[0] == texts[1] else ""


def _pair(verdict: _Verdict, item: Item, member: Member, evidence: Evidence, source: PreferenceSource) -> KeptPair:
    arms = verdict.arms if verdict.preferred > 0 else verdict.arms[::-1]
    return KeptPair(
        key=verdict.key,
        input=member.example.input_key,
        chosen=item.answers[arms[0]].strip(),
        rejected=item.answers[arms[1]].strip(),
        kind=source,
        by=verdict.by,
        when=verdict.when,
        version=str(evidence.lineage["dataset"]),
        evaluation=evidence.id,
        arms=(arms[0], arms[1]),
    )


def _people(folder: Path, evidence: Evidence) -> Iterator[_Verdict]:
    """Yield every reviewer's current verdicts."""
    sample = load_sample(folder / FOLDER, evidence)
    journals: Sequence[Any] = [] if sample is None else read_journals(folder / FOLDER)
    if sample is None or not journals:
        raise UserError(
            "The evaluation has no reviews", where=str(folder), fix="Review it first: tunewright human-eval"
        )
    arms = (sample.treatment, sample.control)
    for journal in journals:
        for key, preferred in preferences(journal, sample).items():
            why_not = "" if preferred else _TIE
            yield _Verdict(key, arms, preferred, journal.reviewer, journal.standing[key].when, why_not)


def _judge(folder: Path, evidence: Evidence) -> Iterator[_Verdict]:
    """Yield the judge's verdicts on the deciding contrast."""
    judgement = evidence.judge
    if judgement is None:
        raise UserError("The evaluation has no judge", where=str(folder), fix="Judge it first: tunewright judge")
    if judgement.vetoed:
        raise UserError(
            f"The judge {judgement.model} failed its controls, so its preferences are not kept",
            where=str(folder),
            fix="Use another judge, or let people judge: tunewright human-eval",
        )
    first = evidence.contrasts[0]
    arms = (first.treatment, first.control)
    for row in load_judged(folder):
        if first.control not in row.pairs:
            continue
        found = row.pairs[first.control].plain
        preferred = {"win": 1, "loss": -1}.get(found.outcome or "", 0)
        why_not = ""
        if found.outcome is None:
            why_not = _UNSCORED
        elif not preferred:
            why_not = _FLIPPED if found.flipped else _TIE
        yield _Verdict(row.key, arms, preferred, judgement.model, judgement.created, why_not)


# Shown at rows


@dataclass(frozen=True)
class RowAnswer:
    """The deciding arm's answer to a row, and its score by the deciding metric; None if it has no such score."""

    evaluation: str
    arm: str
    text: str
    metric: str
    score: float | None


@dataclass(frozen=True)
class EvaluatedRows:
    """An evaluation's folder and evidence, and its items by pair key."""

    folder: Path
    evidence: Evidence
    items: dict[str, Item]

    def awaits_verdict(self, key: str, reviewer: str) -> bool:
        """Return whether the reviewer still has to compare this row's answers blind."""
        incumbents = self.evidence.incumbents.compared if self.evidence.incumbents else ()
        for against in (None, *(each.name for each in incumbents)):
            place = comparison(self.folder, self.evidence, against).folder
            sample = load_sample(place, self.evidence)
            if sample is not None and key in sample.order:
                said = read_journal(place, reviewer).standing.get(key)
                if said is None or said.verdict == "skip":
                    return True
        return False


@dataclass(frozen=True)
class RowAnswers:
    """The evaluations of a project, newest first, as a source of answers to its rows."""

    evaluations: tuple[EvaluatedRows, ...]

    def of(self, key: str, reviewer: str) -> RowAnswer | None:
        """Return the newest answer to a row; None without one, or while the reviewer has yet to compare it."""
        having = [rows for rows in self.evaluations if key in rows.items]
        if not having or any(rows.awaits_verdict(key, reviewer) for rows in having):
            return None
        evidence, item = having[0].evidence, having[0].items[key]
        arm = evidence.contrasts[0].treatment
        if arm not in item.answers:
            return None
        score = item.scores.get(evidence.metric, {}).get(arm)
        return RowAnswer(having[0].folder.name, arm, item.answers[arm], evidence.metric, score)


def evaluated_files(evaluations: Path) -> list[Path]:
    """Return the files of items that :func:`row_answers` reads, newest first."""
    files = [file.with_name(ITEMS_FILE) for file in evaluations.glob(f"[!.]*/{EVIDENCE_FILE}")]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.stat().st_mtime, reverse=True)


def row_answers(files: Sequence[Path], evaluations: Path, reporter: Reporter) -> RowAnswers:
    """Read the answers of these files; an unreadable evaluation is left out with a warning."""
    found = []
    for file in files:
        try:
            evidence = load_checked(file.parent, evaluations, reporter)
            items = {item.key: item for item in load_items(file.parent)}
        except UserError as error:
            reporter.warn(f"The answers of an evaluation are not shown: {error}")
        else:
            found.append(EvaluatedRows(file.parent, evidence, items))
    return RowAnswers(tuple(found))
