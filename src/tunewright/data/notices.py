"""What the user is told while files are added: everything that is left out, moved or doubtful, by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten

from tunewright.config import Duplicates
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.wording import count_of
from tunewright.data.dedup.decontaminate import How
from tunewright.data.dedup.output_leakage import OutputLeak
from tunewright.data.examples import Example, Message
from tunewright.data.readers import Fault, SourceRow
from tunewright.data.readers.row_errors import CODES
from tunewright.data.review.suspects import answers_repeat, class_like
from tunewright.data.splits import Split
from tunewright.data.versions import DatasetVersion, Member

FEWEST_TRAINING_PAIRS = 50
FEW_TRAINING_PAIRS = 500
LARGE_CLUSTER = 0.05
_LONG_INPUT = 200
_MOST_EXAMPLES = 10
_MOST_PLACES = 3
_MOST_REASONS = 3
_LONGEST = 60  # characters of an excerpt
_BEFORE = 20  # characters shown before the first difference of two long texts
_NUMBER = re.compile(r"\d[\d,.]*")


@dataclass(frozen=True)
class Duplicate:
    """A row that was dropped, and the kept one that it repeats: its pair key and where it is found."""

    source: str
    line: int
    key: str
    of: str
    of_place: str
    similarity: float


@dataclass(frozen=True)
class Conflict:
    """One input with several outputs; outputs, pair keys and places go together."""

    input: str
    outputs: tuple[str, ...]
    keys: tuple[str, ...]
    places: tuple[str, ...]


@dataclass(frozen=True)
class Replaced:
    """A row that took the place of one or more with its input: where it was read, keys and outputs."""

    source: str
    line: int
    key: str
    output: str
    before: tuple[str, ...]
    outputs_before: tuple[str, ...]


@dataclass(frozen=True)
class Move:
    """A row that changed its split, because new rows made its cluster part of another."""

    key: str
    before: Split
    now: Split


@dataclass(frozen=True)
class Largest:
    """A large cluster: how many rows it has, the inputs of two that have little in common, and their similarity.

    Below data.dedup_threshold, only a chain of rows (or a shared group) links the two.
    """

    rows: int
    one: str
    other: str
    similarity: float


def faulty(faults: Sequence[Fault]) -> UserError:
    """Return the refusal of files with faulty rows."""
    return UserError(
        f"{count_of(len(faults), 'faulty row')}, nothing was added\n{by_cause(faults)}",
        fix="Correct them, or add the others with --skip-bad. `tunewright data check FILE --json` lists every one.",
    )


def skipped(faults: Sequence[Fault]) -> str:
    """The warning of faulty rows left out; the version that adding may make has each of them in imports.jsonl."""
    return (
        f"{count_of(len(faults), 'faulty row')} left out. If the others are added, imports.jsonl lists each:\n"
        + by_cause(faults)
    )


def by_cause(faults: Sequence[Fault]) -> str:
    """Faults by cause, the most frequent first: how many, three places, and what to do.

    Reasons that differ in numbers only are one cause; a code with many reasons is one cause as a whole.
    """
    alike: dict[str, dict[str, list[Fault]]] = {}
    for fault in faults:
        alike.setdefault(fault.code, {}).setdefault(_NUMBER.sub("#", fault.reason), []).append(fault)
    causes: list[tuple[str | None, list[Fault]]] = []
    for code, reasons in alike.items():
        if len(reasons) > _MOST_REASONS:
            causes.append((f"{CODES[code][0]} [{code}]", [fault for same in reasons.values() for fault in same]))
        else:
            causes += [(None, same) for same in reasons.values()]
    lines: list[str] = []
    for title, same in sorted(causes, key=lambda cause: -len(cause[1])):
        lines += _cause(title, same)
    return "\n".join(lines)


def _cause(title: str | None, faults: Sequence[Fault]) -> list[str]:
    first, fix = faults[0], faults[0].fix
    if len(faults) == 1:
        return [f"  {first} [{first.code} {first.path}]", f"    {fix}"]
    shown = faults[:_MOST_PLACES]
    more = f" and {len(faults) - len(shown):,} more" if len(faults) > len(shown) else ""
    if title is None:
        places = ", ".join(f"{fault.source}:{fault.line}" for fault in shown) + more
        return [f"  {len(faults):,} rows: {first.reason} [{first.code} {first.path}]", f"    {places}", f"    {fix}"]
    places = "; ".join(map(str, shown)) + more
    return [f"  {len(faults):,} rows: {title}", f"    {places}", f"    {fix}"]


def near_duplicates(kept: Sequence[Duplicate]) -> str:
    """Return the notice of new rows that nearly repeat another one and are kept."""
    told = (f"{d.source}:{d.line} is like {d.of_place} (similarity {d.similarity:.2f})" for d in kept)
    lines = listed(told, len(kept), _MOST_EXAMPLES, "the result and the version's imports.jsonl list all")
    return (
        f"{count_of(len(kept), 'near-duplicate')} kept: nearly the input and the output of another row, in its cluster "
        f"(data.duplicates: drop leaves them out):\n{lines}"
    )


def duplicates(dropped: Sequence[Duplicate], setting: Duplicates) -> str:
    """Return the warning of dropped duplicates."""
    told = (f"{d.source}:{d.line} repeats {d.of_place} (similarity {d.similarity:.2f})" for d in dropped)
    lines = listed(told, len(dropped), _MOST_EXAMPLES, "the result and the version's imports.jsonl list all")
    alike = "the input (nearly)" if setting == "drop" else "the input"
    return f"{count_of(len(dropped), 'row')} left out, with {alike} and the output of another:\n{lines}"


def conflicting(conflicts: Sequence[Conflict], inputs: int, *, accepted: bool) -> UserError:
    """Return the refusal of new rows with the input of another and a different output, with a few examples.

    Args:
        conflicts: all of them; three are shown.
        inputs: how many different inputs the dataset would have.
        accepted: the version before was made with accepted conflicts.
    """
    lead = ""
    if 2 * len(conflicts) > inputs:
        most = "Every input has" if len(conflicts) == inputs else "Most inputs have"
        lead = f"{most} several outputs: if these are references, --accept-conflicts keeps them.\n"
    fix = (
        "Keep the right one of each. If the files correct what the dataset has, add them with --replace. If several "
        "are right, add them with --accept-conflicts or data.conflicts: accept."
    )
    if accepted:
        fix += " The version before accepted conflicts by that option, which holds for one command only: give it again."
    examples = (f'"{shorten(c.input, _LONG_INPUT, placeholder="…")}": {_some_outputs(c)}' for c in conflicts)
    lines = listed(examples, len(conflicts), _MOST_PLACES, "`tunewright data check FILE --json` lists all")
    what = f"{count_of(len(conflicts), 'input')} with different outputs, nothing was added; which is right?"
    return UserError(f"{what}\n{lead}{lines}", fix=fix)


def _some_outputs(conflict: Conflict) -> str:
    few = zip(excerpts(conflict.outputs[:_MOST_PLACES]), conflict.places, strict=False)
    shown = "; ".join(f"{output} ({place})" for output, place in few)
    more = len(conflict.outputs) - _MOST_PLACES
    return shown + (f"; and {more:,} more outputs" if more > 0 else "")


def contaminated(held: Sequence[tuple[str, How, str]], *, dropping: bool) -> str:
    """The warning of training rows that hold what is measured on: row, how, item; all of those that are left out."""
    by_row: dict[str, list[tuple[How, str]]] = {}
    for row, how, item in held:
        by_row.setdefault(row, []).append((how, item))
    told = (f"{row} {_holds(items)}" for row, items in by_row.items())
    most = len(by_row) if dropping else _MOST_EXAMPLES
    lines = listed(told, len(by_row), most, "`tunewright data leakage --json` lists all")
    what = "left out" if dropping else "kept (data.contaminated: drop leaves them out)"
    return f"{count_of(len(by_row), 'training row')} with a test input or a benchmark item inside, {what}:\n{lines}"


def _holds(items: Sequence[tuple[How, str]]) -> str:
    how, item = items[0]
    return f"{HOLDS[how]} {item}" + (f" and {len(items) - 1} more" if len(items) > 1 else "")


HOLDS: dict[How, str] = {"equal": "is", "contained": "holds or is a piece of", "overlap": "shares words with"}


def warn_of_lost_classes(members: Sequence[Member], left_out: Collection[str], reporter: Reporter) -> None:
    """Warn of each class that loses more than half of its training rows, where outputs are class-like."""
    if not class_like([m.example.output.strip() for m in members]):
        return
    training = [m for m in members if m.split == "train"]
    rows = Counter(m.example.output.strip() for m in training)
    lost = Counter(m.example.output.strip() for m in training if m.key in left_out)
    for label, count in lost.most_common():
        if 2 * count > rows[label]:
            reporter.warn(
                f"The class {_excerpt(label)} loses {count:,} of its {count_of(rows[label], 'training row')}: they "
                "hold a test input or a benchmark item. Read some of them above; data.contaminated: warn keeps them."
            )


def warn_of_untrained_answers(members: Sequence[Member], reporter: Reporter) -> None:
    """Warn of test rows with an answer that no training row has, where answers are labels or at least half repeat."""
    answers = [m.example.output.strip() for m in members]
    if not (class_like(answers) or answers_repeat(answers)):
        return
    trained = {answer for m, answer in zip(members, answers, strict=True) if m.split == "train"}
    tested = [answer for m, answer in zip(members, answers, strict=True) if m.split == "test"]
    absent = Counter(answer for answer in tested if answer not in trained)
    if absent:
        count = absent.total()
        lines = listed(
            (f"{_excerpt(answer)}: {rows:,}" for answer, rows in absent.most_common()),
            len(absent),
            _MOST_EXAMPLES,
            "`tunewright data export` writes the splits",
        )
        reporter.warn(
            f"{count:,} of {len(tested):,} test rows have an answer that no training row has. An adapter that gives "
            f"only answers it was trained on gets at most {1 - count / len(tested):.1%} of the test right. Add "
            f"training rows with these answers.\n{lines}"
        )


def not_mixed(left_out: Sequence[tuple[str, str]]) -> str:
    """Return the warning of rows that came up in the draw of the mix-in and were passed over."""
    lines = listed(
        (f"{place}: {reason}" for place, reason in left_out),
        len(left_out),
        _MOST_EXAMPLES,
        "the version's imports.jsonl lists all",
    )
    return f"{count_of(len(left_out), 'row')} of the mix-in passed over:\n{lines}"


def largest(clusters: Sequence[Largest]) -> str:
    """Return the largest clusters, in a line."""
    told = ", ".join(f"{cluster.rows:,} rows like {_excerpt(cluster.one)}" for cluster in clusters[:3])
    return f"Largest clusters: {told}"


def warn_of_missing_groups(
    names: Sequence[str],
    parent: DatasetVersion | None,
    groups: Mapping[str, Sequence[str]],
    read: Collection[str],
    reporter: Reporter,
) -> None:
    """Warn of rows of the version before, but those ``read`` again, that have no value of a group that is named now."""
    for name in names:
        before = parent.domain if parent is not None and name not in parent.manifest.settings.group_by else ()
        lacking = sum(
            m.key not in read and not any(v.startswith(f"{name}=") for v in groups.get(m.key, ())) for m in before
        )
        if lacking:
            reporter.warn(
                f"{count_of(lacking, 'row')} of the version before without the group {name}: they were "
                "added before data.group_by named it, so nothing keeps them with the others of theirs. Add their files "
                "again to tell it."
            )


def warn_of_idle_groups(names: Sequence[str], groups: Mapping[str, Sequence[str]], reporter: Reporter) -> None:
    """Warn of each group that joins no rows, because no two share a value, or joins them all.

    Args:
        names: the groups' keys.
        groups: each row's values by its pair key, such as "customer=ACME".
    """
    for name in names:
        of_row = [[v for v in values if v.startswith(f"{name}=")] for values in groups.values()]
        counts = Counter(value for values in of_row for value in values)
        rows = sum(map(bool, of_row))
        if rows < 2:
            continue
        if len(counts) == 1:
            reporter.warn(
                f"data.group_by: all {rows:,} rows with {name} have the same value, so that it joins them into one "
                "cluster. Name a key whose value differs between independent rows."
            )
        elif counts.most_common(1)[0][1] == 1:
            reporter.warn(
                f"data.group_by: {name} has {len(counts):,} different values in {rows:,} rows, so that it joins no two "
                "rows. Name a key that related rows share."
            )


def known_outputs(found: OutputLeak) -> str:
    """Return the warning of a test whose outputs, or their templates, are in training."""
    return (
        f"{found.share('template'):.0%} of the test rows have an output template that training rows have "
        f"({found.share('identical'):.0%} an identical output): scores on them do not show what happens with a new "
        "template. Set data.split_by: output_template in a new dataset, or name the key that rows of one template "
        "share in data.group_by. `tunewright data leakage` has the numbers."
    )


def replaced(rows: Sequence[Replaced]) -> str:
    """Return the notice of rows that took the place of others with their input."""
    told = (_became(r) for r in rows)
    lines = listed(told, len(rows), _MOST_EXAMPLES, "`tunewright data diff` shows all")
    count = sum(len(row.before) for row in rows)
    return f"{count_of(count, 'row')} replaced: the same input, the file's output, the split as before\n{lines}"


def _became(row: Replaced) -> str:
    *before, now = excerpts([*row.outputs_before, row.output])
    return f"{row.source}:{row.line}: {'; '.join(before)} → {now}"


def superseded(rows: Sequence[SourceRow]) -> str:
    """Return the notice of rows that an earlier replacement took out of the dataset."""
    lines = listed((f"{r.source}:{r.line}" for r in rows), len(rows), _MOST_PLACES, "the result lists all")
    return (
        f"{count_of(len(rows), 'row')} superseded earlier by --replace and left out; --restore adds them again\n{lines}"
    )


def standing(rows: Sequence[SourceRow]) -> str:
    """Return the warning of rows that replace nothing, because a reviewer edited their answer."""
    lines = listed((f"{r.source}:{r.line}" for r in rows), len(rows), _MOST_EXAMPLES, "`tunewright data blame` tells")
    return f"{count_of(len(rows), 'row')} not replaced: a reviewer edited the answer, and the edit stands\n{lines}"


def reweighted(examples: Sequence[Example]) -> str:
    """Return the warning of rows that take the place of the same turns with other weights."""
    told = (_excerpt(example.input_text) for example in examples)
    lines = listed(told, len(examples), _MOST_EXAMPLES, "`tunewright data log` shows the version before")
    return f"{count_of(len(examples), 'row')} replaced: the same turns were there with other weights\n{lines}"


def warn_of_another_system_turn(known: Iterable[Example], new: Iterable[Example], reporter: Reporter) -> None:
    """Warn of pairs that were there before with another system turn, as when data.system_prompt has changed since."""
    before = {_turns(example) for example in known}
    again = sum(_turns(example) in before for example in new)
    if again:
        reporter.warn(
            f"{count_of(again, 'new row')}: the version before has the same pair with another system "
            "turn, and both are kept. data.system_prompt is put before pairs when they are added; if you have changed "
            "it, start a new dataset."
        )


def _turns(example: Example) -> tuple[Message, ...]:
    return tuple(message for message in example.messages if message.role != "system")


def warn_of_contents(
    members: Sequence[Member],
    accepted: Sequence[Conflict],
    moved: Sequence[Move],
    largest: Sequence[Largest],
    reporter: Reporter,
) -> None:
    """Warn of what a new version holds: accepted new conflicts, moved rows, a large cluster, little to train on."""
    if accepted:
        told = (f"{_excerpt(c.input)}: {_outputs(c)}" for c in accepted)
        lines = listed(told, len(accepted), _MOST_EXAMPLES, "the result lists all")
        reporter.warn(f"{count_of(len(accepted), 'input')} with different outputs, all kept:\n{lines}")
    for (before, now), count in Counter((move.before, move.now) for move in moved).items():
        reporter.warn(
            f"{count_of(count, 'row')} moved from {before} to {now}: new rows are nearly equal to rows of both, or of "
            "one group with them. Adapters trained on an earlier version may have seen them; train anew before you "
            "compare."
        )
    if largest and largest[0].rows > LARGE_CLUSTER * len(members):
        reporter.warn(_large(largest[0], len(members)))
    training = sum(m.split == "train" for m in members)
    if training < FEWEST_TRAINING_PAIRS:
        reporter.warn(
            f"{count_of(training, 'training pair')}, fewer than {FEWEST_TRAINING_PAIRS}: `tunewright train` refuses so "
            "few without --force. Add pairs, or prompt with them: they fit into a prompt."
        )
    elif training < FEW_TRAINING_PAIRS:
        reporter.warn(
            f"{count_of(training, 'training pair')}, fewer than {FEW_TRAINING_PAIRS}: expect the adapter to learn them "
            "by heart (training loss falls, dev loss rises). `tunewright crossval` measures on all rows."
        )


def _large(cluster: Largest, rows: int) -> str:
    return (
        f"one cluster holds {cluster.rows:,} of {rows:,} rows and stays on one side of the split. Two of its rows, "
        f"{cluster.similarity:.2f} similar, are {_excerpt(cluster.one)} and {_excerpt(cluster.other)}. If an "
        "instruction is written into each of them, move it to data.system_prompt; if chains or groups link what is "
        "independent, raise data.dedup_threshold or group by something smaller."
    )


def _outputs(conflict: Conflict) -> str:
    told = zip(excerpts(conflict.outputs), conflict.places, strict=True)
    return "; ".join(f"{output} ({place})" for output, place in told)


def listed(lines: Iterable[str], count: int, most: int, where_all: str) -> str:
    """Return the first lines, and how many more there are and where all of them stand."""
    shown = [f"  {line}" for _, line in zip(range(most), lines, strict=False)]
    if count > most:
        shown.append(f"  and {count - most} more: {where_all}")
    return "\n".join(shown)


def excerpts(texts: Sequence[str]) -> list[str]:
    """Return a quoted excerpt of at most 60 characters of each text, by which unlike texts can be told apart.

    A text that another one equals so far begins shortly before their first difference.
    """
    lines = [" ".join(text.split()) for text in texts]
    return [_told_apart(line, [other for other in lines if other != line]) for line in lines]


def _told_apart(line: str, others: Sequence[str]) -> str:
    same = max((_equal_until(line, other) for other in others), default=0)
    if same < _LONGEST - 1:
        return f'"{_cut(line)}"'
    # At a word, unless that is longer than what is shown before the difference.
    start = line.rfind(" ", same - 2 * _BEFORE, same - _BEFORE) + 1 or same - _BEFORE
    return f'"…{_cut(line[start:])}"'


def _equal_until(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _excerpt(text: str) -> str:
    return excerpts([text])[0]


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
