"""Messages while files are added: rows left out, moved or doubtful, by name."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from tunewright.config import Duplicates, ReasoningMode
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of, excerpts, first_of, listed
from tunewright.data.dedup.decontaminate import MatchKind
from tunewright.data.dedup.output_leakage import LOW_CEILING, OutputLeakage
from tunewright.data.examples import MOST_CLASSES, Example, Message, answers_repeat, find_labels
from tunewright.data.readers import Fault, SourceRow
from tunewright.data.readers.row_errors import CODES
from tunewright.data.splits import FEW_TRAINING_PAIRS, FEWEST_TRAINING_PAIRS, Split
from tunewright.data.versions import DatasetVersion, Member

LARGE_CLUSTER = 0.05
_LONG_INPUT = 200
_MOST_EXAMPLES = 10
_MOST_PLACES = 3
_MOST_REASONS = 3
_NUMBER = re.compile(r"\d[\d,.]*")


@dataclass(frozen=True)
class Duplicate:
    """A dropped row and the kept row that it repeats, with pair key and place."""

    source: str
    line: int
    key: str
    of: str
    of_place: str
    similarity: float


@dataclass(frozen=True)
class Conflict:
    """An input with several outputs; outputs, pair keys and places are parallel."""

    input: str
    outputs: tuple[str, ...]
    keys: tuple[str, ...]
    places: tuple[str, ...]


@dataclass(frozen=True)
class ReplacedRow:
    """A row that replaced one or more rows with the same input."""

    source: str
    line: int
    key: str
    output: str
    before: tuple[str, ...]
    outputs_before: tuple[str, ...]


@dataclass(frozen=True)
class SplitChange:
    """A row whose split changed because new rows joined its cluster to another."""

    key: str
    before: Split
    now: Split


@dataclass(frozen=True)
class LargeCluster:
    """A large cluster, the inputs of two dissimilar rows in it, and their similarity.

    Below data.dedup_threshold, only a chain of rows or a shared group links the two.
    """

    rows: int
    one: str
    other: str
    similarity: float


_REASONING: Mapping[ReasoningMode, str] = {
    "train": "trained, with the answer after it",
    "mask": "shown to the model but not trained",
    "strip": "left out of training; the dataset keeps it",
}


def reasoning_notice(rows: int, mode: ReasoningMode) -> str:
    """Return the note on rows with thinking, and on its use in training."""
    have = f"{count_of(rows, 'row')} with thinking (reasoning_content)"
    return f"{have}, which is {_REASONING[mode]} (chat.reasoning: {mode})"


def of_files(notes: Iterable[tuple[Path | str, Sequence[str]]]) -> list[str]:
    """Return the notes on files; equal notes on several files become one."""
    files: dict[str, list[str]] = {}
    for path, each in notes:
        for note in each:
            rest = note.removeprefix(str(path))
            files.setdefault(rest if rest.startswith(": ") else note, []).append(str(path))
    return [(first_of(paths, 1) if note.startswith(": ") else "") + note for note, paths in files.items()]


def faulty(faults: Sequence[Fault]) -> UserError:
    """Return the error for files with faulty rows."""
    return UserError(
        f"{count_of(len(faults), 'faulty row')}, nothing was added\n{by_cause(faults)}",
        fix="Correct the rows, or skip them with --skip-bad. `tunewright data check FILE --json` lists each fault.",
    )


def skipped(faults: Sequence[Fault]) -> str:
    """Return the warning for skipped faulty rows."""
    return f"{count_of(len(faults), 'faulty row')} left out. The new version's imports.jsonl lists each:\n" + by_cause(
        faults
    )


def by_cause(faults: Sequence[Fault]) -> str:
    """Group faults by cause, the most frequent first, with count, three places and the fix.

    Reasons that differ only in numbers are one cause. A code with many reasons is one cause.
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
        first, shown = same[0], same[:_MOST_PLACES]
        code = f"[{first.code} {first.path}]" if first.column is None else f"[{first.code}, column {first.column}]"
        if len(same) == 1:
            lines += [f"  {first} {code}", f"    {first.fix}"]
            continue
        places = "; ".join(map(str, shown))
        if title is None:
            title, places = f"{first.reason} {code}", ", ".join(f"{fault.source}:{fault.line}" for fault in shown)
        more = f" and {len(same) - len(shown):,} more" if len(same) > len(shown) else ""
        lines += [f"  {len(same):,} rows: {title}", f"    {places}{more}", f"    {first.fix}"]
    return "\n".join(lines)


def near_duplicates(kept: Sequence[Duplicate]) -> str:
    """Return the notice of new near-duplicates that are kept."""
    entries = (f"{d.source}:{d.line} is like {d.of_place} (similarity {d.similarity:.2f})" for d in kept)
    lines = listed(entries, len(kept), _MOST_EXAMPLES, "the result and the version's imports.jsonl list all")
    return (
        f"{count_of(len(kept), 'near-duplicate')} kept, in the cluster of the row with nearly the same input and the "
        f"same output (data.duplicates: drop removes them):\n{lines}"
    )


def duplicates(dropped: Sequence[Duplicate], setting: Duplicates) -> str:
    """Return the warning for dropped duplicates."""
    entries = (f"{d.source}:{d.line} repeats {d.of_place} (similarity {d.similarity:.2f})" for d in dropped)
    lines = listed(entries, len(dropped), _MOST_EXAMPLES, "the result and the version's imports.jsonl list all")
    kind = "duplicate or near-duplicate" if setting == "drop" else "duplicate"
    return f"{count_of(len(dropped), 'row')} left out as {kind}:\n{lines}"


def conflicting(conflicts: Sequence[Conflict], inputs: int, *, accepted: bool) -> UserError:
    """Return the error for new rows whose input has another output, with a few examples.

    The dataset has ``inputs`` distinct inputs; ``accepted`` is true if its version accepted conflicts.
    """
    lead = ""
    if 2 * len(conflicts) > inputs:
        most = "Every input has" if len(conflicts) == inputs else "Most inputs have"
        lead = f"{most} several outputs. If these are alternative references, use --accept-conflicts.\n"
    fix = (
        "Keep the right output of each input: `tunewright data check FILE --fix COPY --leave-out LINE` writes a copy "
        "without a wrong one. If the files correct rows of the dataset, use --replace. If several "
        "outputs are right, use --accept-conflicts or data.conflicts: accept."
    )
    if accepted:
        fix += " The previous version accepted conflicts with that option, which holds for one command: pass it again."
    examples = []
    for conflict in conflicts[:_MOST_PLACES]:
        few = zip(excerpts(conflict.outputs[:_MOST_PLACES]), conflict.places, strict=False)
        shown = "; ".join(f"{output} ({place})" for output, place in few)
        more = len(conflict.outputs) - _MOST_PLACES
        also = f"; and {more:,} more outputs" if more > 0 else ""
        examples.append(f'"{shorten(conflict.input, _LONG_INPUT, placeholder="…")}": {shown}{also}')
    lines = listed(examples, len(conflicts), _MOST_PLACES, "`tunewright data check FILE --json` lists all")
    what = f"{count_of(len(conflicts), 'input')} with different outputs, nothing was added"
    return UserError(f"{what}\n{lead}{lines}", fix=fix)


_CONTAINS = (
    '"Contains or is part of": one text, or nearly all of it, is in the other. Near-duplicates '
    "(data.dedup_threshold) are searched for separately; `tunewright data leakage` shows both."
)


def contaminated(held: Sequence[tuple[str, MatchKind, str]], *, dropping: bool) -> str:
    """Return the warning for training rows that contain a test input or a benchmark item; rows left out are all listed.

    ``held`` has the row, the kind of match and the item of each hit.
    """
    by_row: dict[str, list[tuple[MatchKind, str]]] = {}
    for row, how, item in held:
        by_row.setdefault(row, []).append((how, item))
    entries = []
    for row, items in by_row.items():
        how, item = items[0]
        entries.append(f"{row} {HOLDS[how]} {item}" + (f" and {len(items) - 1:,} more" if len(items) > 1 else ""))
    most = len(by_row) if dropping else _MOST_EXAMPLES
    lines = listed(entries, len(by_row), most, "`tunewright data leakage --json` lists all")
    what = "left out" if dropping else "kept (data.contaminated: drop removes them)"
    text = f"{count_of(len(by_row), 'training row')} with a test input or a benchmark item, {what}:\n{lines}"
    if dropping or all(how == "equal" for _, how, _ in held):
        return text
    return f"{text}\n{_CONTAINS}"


def unaccepted(places: Sequence[str]) -> str:
    """Return the warning for generated rows that are left out because they would be held out."""
    what = count_of(len(places), "generated row")
    lines = listed(places, len(places), _MOST_PLACES, "the version's imports.jsonl lists all")
    return f"{what} left out: nobody has accepted them, and they share a cluster with a dev or test row:\n{lines}"


HOLDS: dict[MatchKind, str] = {"equal": "is", "contained": "contains or is part of", "overlap": "shares words with"}


def warn_of_lost_classes(members: Sequence[Member], left_out: Collection[str], reporter: Reporter) -> None:
    """Warn of each class that loses more than half of its training rows, if outputs are classes."""
    if not find_labels(m.example.output for m in members):
        return
    training = [m for m in members if m.split == "train"]
    rows = Counter(m.example.output.strip() for m in training)
    lost = Counter(m.example.output.strip() for m in training if m.key in left_out)
    for label, count in lost.most_common():
        if 2 * count > rows[label]:
            reporter.warn(
                f"The class {_excerpt(label)} loses {count:,} of its {count_of(rows[label], 'training row')}, which "
                "contain a test input or a benchmark item. Check the list above; data.contaminated: warn keeps them."
            )


def warn_of_untrained_answers(members: Sequence[Member], reporter: Reporter) -> None:
    """Warn of test answers that no training row has, if answers are labels or at least half repeat."""
    answers = [m.example.output.strip() for m in members]
    if not (find_labels(answers) or answers_repeat(answers)):
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
            f"{count:,} of {len(tested):,} test rows have an answer that no training row has. An adapter that repeats "
            f"training answers scores at most {1 - count / len(tested):.1%} on the test split. Add training rows with "
            f"these answers.\n{lines}"
        )


def warn_of_one_answer(members: Sequence[Member], metric: str, reporter: Reporter) -> None:
    """Warn of an answer that more than half of the rows have, unless the metric counts each class alike."""
    counts = Counter(m.example.output.strip() for m in members)
    answer, rows = next(iter(counts.most_common(1)), ("", 0))
    if 2 * rows <= len(members) or (metric == "macro_f1" and len(counts) > 1):
        return
    share = f"{math.floor(1000 * rows / len(members)) / 10:g}%"  # rounded down: 100% means every row
    text = f"{rows:,} of {len(members):,} rows ({share}) have the answer {_excerpt(answer)}"
    fix = " evaluate.metric: macro_f1 counts each answer alike." if len(counts) <= MOST_CLASSES else ""
    if rows == len(members):
        fix = " There is nothing to learn: add rows with other answers."
    reporter.warn(f"{text}: always answering it scores {share} by exact_match.{fix}")


def not_mixed(left_out: Sequence[tuple[str, str]]) -> str:
    """Return the warning for mix-in rows that were drawn and rejected."""
    lines = listed(
        (f"{place}: {reason}" for place, reason in left_out),
        len(left_out),
        _MOST_EXAMPLES,
        "the version's imports.jsonl lists all",
    )
    return f"{count_of(len(left_out), 'row')} of the mix-in rejected:\n{lines}"


def largest(clusters: Sequence[LargeCluster]) -> str:
    """Return a line on the three largest clusters."""
    sizes = ", ".join(f"{cluster.rows:,} rows like {_excerpt(cluster.one)}" for cluster in clusters[:3])
    return f"Largest clusters: {sizes}"


def warn_of_missing_groups(
    names: Sequence[str],
    parent: DatasetVersion | None,
    groups: Mapping[str, Sequence[str]],
    read: Collection[str],
    reporter: Reporter,
) -> None:
    """Warn of rows of the previous version without a value of a newly named group, unless ``read`` again."""
    for name in names:
        before = parent.domain if parent is not None and name not in parent.manifest.settings.group_by else ()
        lacking = sum(
            m.key not in read and not any(v.startswith(f"{name}=") for v in groups.get(m.key, ())) for m in before
        )
        if lacking:
            reporter.warn(
                f"{count_of(lacking, 'row')} of the previous version without the group {name}: they were added before "
                "data.group_by named it, so they may be split apart from their group. Add their files again."
            )


def warn_of_idle_groups(names: Sequence[str], groups: Mapping[str, Sequence[str]], reporter: Reporter) -> None:
    """Warn of each group that joins no rows, because no two share a value, or joins them all."""
    for name in names:
        of_row = [[v for v in values if v.startswith(f"{name}=")] for values in groups.values()]
        counts = Counter(value for values in of_row for value in values)
        rows = sum(map(bool, of_row))
        if rows < 2:
            continue
        if len(counts) == 1:
            reporter.warn(
                f"data.group_by: all {rows:,} rows with {name} have the same value and form one cluster. Name a key "
                "whose value differs between independent rows."
            )
        elif counts.most_common(1)[0][1] == 1:
            reporter.warn(
                f"data.group_by: {name} has {len(counts):,} different values in {rows:,} rows, so it joins no rows. "
                "Name a key that related rows share."
            )


def known_outputs(found: OutputLeakage) -> str:
    """Return the warning for a test split whose outputs, or their templates, are in training."""
    ceiling = found.ceiling or 0.0
    advice = "Set data.split_by: output_template in a new dataset, or name their key in data.group_by. There, no"
    if ceiling < LOW_CEILING:
        advice = "Keep data.split_by: input. Split by output_template, no"
    return (
        f"{found.share('template'):.0%} of the test rows have an output template that training rows have "
        f"({found.share('identical'):.0%} an identical output). Scores on them do not measure new templates. {advice} "
        f"test answer is in training, and at most {ceiling:.0%} consist of words of their prompt or other templates: "
        "the highest score to expect. `tunewright data leakage` reports the numbers."
    )


def replaced(rows: Sequence[ReplacedRow]) -> str:
    """Return the notice of rows that replaced others with their input."""
    became = []
    for row in rows[:_MOST_EXAMPLES]:
        *before, now = excerpts([*row.outputs_before, row.output])
        became.append(f"{row.source}:{row.line}: {'; '.join(before)} → {now}")
    lines = listed(became, len(rows), _MOST_EXAMPLES, "`tunewright data diff` shows all")
    count = sum(len(row.before) for row in rows)
    return f"{count_of(count, 'row')} replaced (same input and split, new output):\n{lines}"


def superseded(rows: Sequence[SourceRow]) -> str:
    """Return the notice of rows that an earlier replacement superseded."""
    lines = listed((f"{r.source}:{r.line}" for r in rows), len(rows), _MOST_PLACES, "the result lists all")
    return (
        f"{count_of(len(rows), 'row')} left out, superseded by --replace earlier. --restore adds them again:\n{lines}"
    )


def kept_edits(rows: Sequence[SourceRow]) -> str:
    """Return the warning for rows that replace nothing because a reviewer edited the answer."""
    places = (f"{r.source}:{r.line}" for r in rows)
    lines = listed(places, len(rows), _MOST_EXAMPLES, "`tunewright data blame` names the reviewer")
    return f"{count_of(len(rows), 'row')} not replaced, because a reviewer edited the answer:\n{lines}"


def reweighted(examples: Sequence[Example]) -> str:
    """Return the warning for rows that replace the same turns with other weights."""
    entries = (_excerpt(example.input_text) for example in examples)
    lines = listed(entries, len(examples), _MOST_EXAMPLES, "`tunewright data log` shows the previous version")
    return f"{count_of(len(examples), 'row')} replaced (same turns, other weights):\n{lines}"


def warn_of_another_system_turn(known: Iterable[Example], new: Iterable[Example], reporter: Reporter) -> None:
    """Warn of known pairs that are added with another system turn, as after a change of data.system_prompt."""

    def turns(example: Example) -> tuple[Message, ...]:
        return tuple(message for message in example.messages if message.role != "system")

    before = set(map(turns, known))
    again = sum(turns(example) in before for example in new) if before else 0
    if again:
        reporter.warn(
            f"{count_of(again, 'new row')} with a pair that the previous version has with another system turn; both "
            "are kept. data.system_prompt is put before pairs when they are added: if you changed it, start a new "
            "dataset."
        )


def warn_of_contents(
    members: Sequence[Member],
    accepted: Sequence[Conflict],
    moved: Sequence[SplitChange],
    largest: Sequence[LargeCluster],
    reporter: Reporter,
) -> None:
    """Warn of accepted conflicts, moved rows, a large cluster and too few training rows."""
    if accepted:
        entries = []
        for conflict in accepted[:_MOST_EXAMPLES]:
            pairs = zip(excerpts(conflict.outputs), conflict.places, strict=True)
            outputs = "; ".join(f"{output} ({place})" for output, place in pairs)
            entries.append(f"{_excerpt(conflict.input)}: {outputs}")
        lines = listed(entries, len(accepted), _MOST_EXAMPLES, "the result lists all")
        reporter.warn(f"{count_of(len(accepted), 'input')} with different outputs, all kept:\n{lines}")
    for (before, now), count in Counter((move.before, move.now) for move in moved).items():
        reporter.warn(
            f"{count_of(count, 'row')} moved from {before} to {now}, because new rows link clusters of both splits. "
            "Adapters trained on an earlier version may have seen them: retrain before you compare."
        )
    if largest and largest[0].rows > LARGE_CLUSTER * len(members):
        cluster = largest[0]
        reporter.warn(
            f"one cluster holds {cluster.rows:,} of {len(members):,} rows and stays in one split. Two of its rows, "
            f"{cluster.similarity:.2f} similar, are {_excerpt(cluster.one)} and {_excerpt(cluster.other)}. If each row "
            "repeats an instruction, move it to data.system_prompt. If chains or groups link independent rows, raise "
            "data.dedup_threshold or group by a finer key."
        )
    training = sum(m.split == "train" for m in members)
    if training < FEWEST_TRAINING_PAIRS:
        reporter.warn(
            f"{count_of(training, 'training pair')}, fewer than {FEWEST_TRAINING_PAIRS}: `tunewright train` requires "
            "--force. Add pairs, or use them as examples in a prompt."
        )
    elif training < FEW_TRAINING_PAIRS:
        reporter.warn(
            f"{count_of(training, 'training pair')}, fewer than {FEW_TRAINING_PAIRS}: an adapter can overfit "
            "them, which a rising dev loss shows. More pairs help. `tunewright crossval` trains several adapters, and "
            "so measures on all rows."
        )


def _excerpt(text: str) -> str:
    return excerpts([text])[0]
