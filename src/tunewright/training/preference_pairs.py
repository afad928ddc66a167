"""The preference data of a dataset version: rejected answers of its rows, and pairs kept from judged evaluations.

A pair whose input is in dev or test is never trained on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunewright.chat import ChatFormat, Tokens
from tunewright.config import Method, TrainConfig
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of, listed
from tunewright.data.examples import Example, Message
from tunewright.data.readers.validate import rejected_messages
from tunewright.data.trace import rejected_answers
from tunewright.data.versions import DatasetVersion, Member, short
from tunewright.data.versions.logs import read_kept_pairs
from tunewright.training.rows import EncodedRows, name_of, training_rows

_MOST = 10
_WHERE = "train.method"
_EQUAL = "both answers are equal"
_BOTH_WAYS = "it is preferred both ways"


@dataclass(frozen=True)
class AnswerPair:
    """A training input with a chosen and a rejected answer, each the turns that follow the prompt."""

    member: Member
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        """The input and digests of both answers."""
        return (self.member.example.input_key, _digest(self.chosen), _digest(self.rejected))


@dataclass(frozen=True)
class PairSet:
    """The pairs of a version that may be trained on, sorted, and the other pairs by the reason for leaving them out."""

    pairs: tuple[AnswerPair, ...]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Reason to the names of the rows."""

    @property
    def digest(self) -> str:
        """The SHA-256 of the pairs."""
        return digest([pair.key for pair in self.pairs])

    def report(self, reporter: Reporter) -> None:
        """Report the number of pairs; name the rows of the other pairs."""
        for reason, names in self.left_out.items():
            rows = listed(names, len(names), _MOST, "`tunewright data show ROW` shows a row")
            reporter.warn(f"{count_of(len(names), 'preference pair')} left out: {reason}\n{rows}")


def read_pairs(dataset: Path, version: DatasetVersion) -> PairSet:
    """Return the preference pairs of a version."""
    found: dict[tuple[str, str, str], AnswerPair] = {}
    left_out: dict[str, list[str]] = defaultdict(list)

    def add(member: Member, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> None:
        if member.split != "train":
            left_out[f"the input is in the {member.split} split"].append(name_of(member))
        elif _text(chosen) == _text(rejected):
            left_out[_EQUAL].append(name_of(member))
        else:
            pair = AnswerPair(member, chosen, rejected)
            found[pair.key] = pair

    answers = rejected_answers(dataset, version.manifest)
    for member in version.domain:
        for value in answers.get(member.key, ()):
            add(member, member.example.messages[-1:], rejected_messages(value))
    of_input = {member.example.input_key: member for member in version.domain}
    for kept in read_kept_pairs(dataset):
        if kept.input in of_input:
            add(
                of_input[kept.input],
                rejected_messages(kept.chosen),
                rejected_messages(kept.rejected),
            )
        else:
            left_out["the version has no row with the input"].append(f"row {short(kept.key)}")
    contradicted = {key for key in found if (key[0], key[2], key[1]) in found}
    for key in sorted(contradicted):
        left_out[_BOTH_WAYS].append(name_of(found[key].member))
    return PairSet(tuple(found[key] for key in sorted(found.keys() - contradicted)), dict(left_out))


def preference_inputs(settings: TrainConfig, dataset: Path, version: DatasetVersion) -> dict[str, Any]:
    """Return the preference data as an input of a training; empty with ``method: sft``."""
    return {"preferences": read_pairs(dataset, version).digest} if settings.prefers else {}


@dataclass(frozen=True)
class PreferenceRows:
    """Encoded answers to train on.

    With dpo and orpo, answer ``2 * i`` is the chosen and ``2 * i + 1`` the rejected one of pair i.
    With kto, answers are unpaired.
    """

    method: Method
    answers: EncodedRows
    desirable: tuple[bool, ...]
    """For each answer: chosen, or rejected."""
    undesirable_weight: float = 1.0
    desirable_weight: float = 1.0
    digest: str = ""
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def answers_per_row(self) -> int:
        """Answers of one training row."""
        return 1 if self.method == "kto" else 2

    def __len__(self) -> int:
        """Return the number of training rows: pairs, or with kto answers."""
        return len(self.answers.rows) // self.answers_per_row

    @property
    def members(self) -> list[Member]:
        """The example of each training row."""
        return self.answers.members[:: self.answers_per_row]

    @property
    def rows(self) -> list[Tokens]:
        """The encoded answers."""
        return self.answers.rows

    @property
    def lineage(self) -> dict[str, Any]:
        """The entry of the adapter's lineage."""
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        return {
            "preferences": {
                "method": self.method,
                "digest": self.digest,
                "pairs": None if self.method == "kto" else len(self),
                "answers": {"chosen": sum(self.desirable), "rejected": len(self.desirable) - sum(self.desirable)},
                **(weights if self.method == "kto" else {}),
                "left_out": self.left_out,
                "rows": sorted({member.key for member in self.answers.members}),
            }
        }


def preference_rows(
    settings: TrainConfig, dataset: Path, version: DatasetVersion, chat: ChatFormat, limit: int, reporter: Reporter
) -> PreferenceRows:
    """Return the encoded preference data of a version, each answer verified."""
    pairs = read_pairs(dataset, version)
    pairs.report(reporter)
    if not pairs.pairs:
        raise UserError(
            f"Version {short(version.digest)} has no preference pair to train on"
            + (f" ({sum(map(len, pairs.left_out.values())):,} left out)" if pairs.left_out else ""),
            where=_WHERE,
            fix="Add rows with `prompt`, `chosen` and `rejected`, or keep pairs of a judged evaluation: "
            "docs/how-to/preference-tuning.md.",
        )
    if settings.method == "kto":
        sides, desirable = _single_answers(pairs.pairs, version)
    else:
        sides = [_side(pair.member, answer) for pair in pairs.pairs for answer in (pair.chosen, pair.rejected)]
        desirable = [True, False] * len(pairs.pairs)
    found = _encoded(chat, sides, desirable, limit, settings, reporter)
    if not found.rows:
        raise UserError("No preference pair is short enough to train on", where="train.max_length", fix="Raise it.")
    return replace(found, digest=pairs.digest, left_out={why: len(names) for why, names in pairs.left_out.items()})


def _single_answers(pairs: Sequence[AnswerPair], version: DatasetVersion) -> tuple[list[Member], list[bool]]:
    """Return the good answers (every training row's ideal output, and kept chosen answers), then the bad answers.

    An answer that is chosen in one pair and rejected in another is left out.
    """
    good: dict[tuple[str, str], Member] = {}
    bad: dict[tuple[str, str], Member] = {}
    for member in version.domain_of("train"):
        last = member.example.messages[-1:]
        good[member.example.input_key, _digest(last)] = _side(member, last)
    for pair in pairs:
        asked, chosen, rejected = pair.key
        good.setdefault((asked, chosen), _side(pair.member, pair.chosen))
        bad[asked, rejected] = _side(pair.member, pair.rejected)
    both = good.keys() & bad.keys()
    lists = [[each[key] for key in sorted(each.keys() - both)] for each in (good, bad)]
    return [*lists[0], *lists[1]], [True] * len(lists[0]) + [False] * len(lists[1])


def _side(member: Member, answer: tuple[Message, ...]) -> Member:
    """Return the row with this answer. Only the answer is trained: earlier turns are the same on both sides."""
    prompt = tuple(replace(m, weight=0) if m.role == "assistant" else m for m in member.example.prompt)
    return replace(member, example=Example((*prompt, *(replace(m, weight=1) for m in answer))))


def _encoded(
    chat: ChatFormat,
    sides: Sequence[Member],
    desirable: Sequence[bool],
    limit: int,
    settings: TrainConfig,
    reporter: Reporter,
) -> PreferenceRows:
    encoded = training_rows(chat, sides, limit, settings.on_overlength, reporter)
    rows: dict[int, list[Tokens]] = defaultdict(list)
    for member, row in zip(encoded.members, encoded.rows, strict=True):
        rows[id(member)].append(row)
    if several := [side for side in sides if len(rows[id(side)]) > 1]:
        raise UserError(
            f"{count_of(len(several), 'answer')} of preference pairs take several rows with this template, the first "
            f"is of {name_of(several[0])}",
            where=chat.template.name,
            fix="Remove the pairs whose answers have several turns.",
        )
    fits = [bool(rows[id(side)]) for side in sides]
    if settings.method != "kto":  # a pair is left out as a whole
        fits = [both for i in range(0, len(sides), 2) for both in [fits[i] and fits[i + 1]] * 2]
    kept = [place for place, fit in enumerate(fits) if fit]
    answers = EncodedRows(
        [rows[id(sides[place])][0] for place in kept], [sides[place] for place in kept], encoded.too_long, []
    )
    found = PreferenceRows(settings.method, answers, tuple(desirable[place] for place in kept))
    if settings.method == "kto":
        return _balanced(found, reporter)
    reporter.say(f"{count_of(len(found), 'preference pair')} of {len({m.key for m in found.members}):,} training rows")
    return found


def _balanced(rows: PreferenceRows, reporter: Reporter) -> PreferenceRows:
    """Weigh the rarer answers so that both kinds count the same (Ethayarajh et al. 2024, eq. 8)."""
    counts = Counter(rows.desirable)
    if not (counts[True] and counts[False]):
        raise UserError(
            f"KTO needs good and bad answers (got {counts[True]:,} and {counts[False]:,})",
            where=_WHERE,
            fix="Add rows with a rejected answer.",
        )
    good, bad = max(1.0, counts[False] / counts[True]), max(1.0, counts[True] / counts[False])
    reporter.say(
        f"KTO: {counts[True]:,} good and {counts[False]:,} bad answers; they weigh {good:.3g} and {bad:.3g}, so that "
        "both kinds count the same."
    )
    return replace(rows, desirable_weight=good, undesirable_weight=bad)


def _text(answer: Iterable[Message]) -> list[str]:
    return [message.text.strip() for message in answer]


def _digest(answer: Iterable[Message]) -> str:
    return digest([message.as_dict() for message in answer])
