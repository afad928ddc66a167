"""Adding files of pairs: read, drop what repeats, cluster, split, and save as a new dataset version."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunewright.data import notices, secrets
from tunewright.data.examples import Example
from tunewright.data.formats import Fault, Reading, SourceRow, read_pairs, source_digest, source_size
from tunewright.data.neighbours import find_clusters, find_duplicates
from tunewright.data.notices import Conflict, Duplicate, Move
from tunewright.data.review.edits import replaced
from tunewright.data.review.suspects import class_like
from tunewright.data.splits import SPLITS, Split, assign_splits
from tunewright.data.versions import (
    Counts,
    DatasetVersion,
    Manifest,
    Member,
    Settings,
    Source,
    has_version,
    keys_digest,
    load_version,
    locked,
    members_digest,
    save_version,
    short,
)
from tunewright.errors import UserError
from tunewright.progress import Reporter
from tunewright.project import Project
from tunewright.recipe import Recipe


@dataclass(frozen=True)
class AddResult:
    """What became of the added files' rows; ``version`` is current afterwards, ``created`` says whether it is new.

    ``added`` counts new examples, ``known`` rows that the version before had already.
    """

    version: Manifest
    created: bool
    added: int
    known: int
    duplicates: tuple[Duplicate, ...]
    conflicts: tuple[Conflict, ...]
    moved: tuple[Move, ...]
    skipped: tuple[Fault, ...]
    redacted: dict[str, int]
    """How many secrets and personal data, by kind, placeholders took the place of."""
    personal: dict[str, int]
    """How much personal data, by kind, was left in."""

    def as_dict(self) -> dict[str, Any]:
        """The result as ``--json`` prints it."""
        return {**asdict(self), "version": self.version.model_dump(mode="json")}


@dataclass(frozen=True)
class _Merge:
    """The rows of the parent version and the new ones, without what repeats; all by pair key."""

    parent: DatasetVersion | None
    kept: dict[str, Example]
    first: dict[str, SourceRow]  # where each new pair key was read first, dropped ones included
    dropped: dict[str, tuple[str, float]]  # new pair key: the kept one that it repeats, and their similarity
    reweighted: dict[str, str]  # new pair key: the parent's one of the same turns, other weights, that it replaces
    edited: dict[str, str]  # pair key that an edit has replaced since: what came of it

    @property
    def former(self) -> dict[str, Split]:
        splits = {m.key: m.split for m in self.parent.members} if self.parent else {}
        return splits | {new: splits[old] for new, old in self.reweighted.items()}

    def place(self, key: str) -> str:
        """Where people find a row: file:line, or the version that has it."""
        row = self.first.get(key)
        if row is not None:
            return f"{row.source}:{row.line}"
        return f"version {short(self.parent.digest if self.parent else '')}, row {short(key)}"


def add(
    project: Project,
    files: Sequence[Path],
    reporter: Reporter,
    *,
    skip_bad: bool = False,
    redact: bool = False,
    message: str = "",
) -> AddResult:
    """Add files of pairs to the project's dataset; rows that it has already change nothing.

    Args:
        project: its recipe names CSV columns, system turn, similarity, shares and seed.
        files: files that ``read_pairs`` reads.
        reporter: is warned of all that is left out, moved or doubtful.
        skip_bad: leave faulty rows out, each named, instead of refusing.
        redact: put placeholders for secrets and personal data, instead of refusing secrets.
        message: kept with the version.

    Raises:
        UserError: faulty rows (all are listed), secrets (named by place, never by value), a file that cannot be read,
            too few rows to split, a dataset that was changed by hand, a full disk. The dataset is then as it was.
    """
    readings = _read(files, project.recipe, reporter)
    skipped = [fault for reading in readings for fault in reading.faults]
    if skipped and not skip_bad:
        raise notices.faulty(skipped)
    if skipped:
        reporter.warn(notices.skipped(skipped))
    rows = [row for reading in readings for row in reading.rows]
    redacted: Counter[str] = Counter()
    if redact:
        rows, redacted = _redacted(rows, reporter)
    personal = _screened(rows, reporter)
    with locked(project.dataset):
        merge = _merge(project.dataset, rows, project.recipe.data.similarity, reporter)
        members = _members(merge, project.recipe, reporter)
        fates = [_fate(row, merge) for row in rows]
        duplicates = tuple(_duplicate(row, fate, merge) for row, fate in zip(rows, fates, strict=True) if "of" in fate)
        if duplicates:
            reporter.warn(notices.duplicates(duplicates))
        conflicts = _conflicts(merge)
        moved = _moved(merge, members)
        created = merge.parent is None or merge.parent.digest != members_digest(members)
        if merge.reweighted:
            reporter.warn(notices.reweighted([merge.kept[key] for key in merge.reweighted]))
        if created:
            sources = _sources(files, readings, project.root)
            counts = _counts(members, len(conflicts), len(duplicates), len(skipped), len(moved))
            version = _manifest(merge, members, project.recipe, message, counts, list(sources.values()))
            notices.warn_of_another_system_turn(
                [m.example for m in merge.parent.members] if merge.parent else [],
                [merge.kept[key] for key in merge.first if key in merge.kept],
                reporter,
            )
            notices.warn_of_contents(members, conflicts, moved, merge.first.keys(), reporter)
            version = save_version(project.dataset, version, members, _imports(rows, fates, skipped, sources), reporter)
        else:
            assert merge.parent is not None
            version = merge.parent.manifest
            if message:
                reporter.warn("Nothing is new, so there is no version to keep the message with.")
    return AddResult(
        version=version,
        created=created,
        added=sum(fate["fate"] == "added" for fate in fates),
        known=sum(fate["fate"] == "known" for fate in fates),
        duplicates=duplicates,
        conflicts=conflicts,
        moved=moved,
        skipped=tuple(skipped),
        redacted=dict(redacted),
        personal=personal,
    )


def _screened(rows: Sequence[SourceRow], reporter: Reporter) -> dict[str, int]:
    """Refuse secrets and warn of personal data, which is counted by kind."""
    found = secrets.scan([(f"{row.source}:{row.line}", row.example) for row in rows], reporter)
    if found.of("secret"):
        raise secrets.blocked(found)
    if found.of("personal"):
        reporter.warn(secrets.warned(found))
    return dict(found.counts)


def _redacted(rows: Sequence[SourceRow], reporter: Reporter) -> tuple[list[SourceRow], Counter[str]]:
    done: list[SourceRow] = []
    counts: Counter[str] = Counter()
    with reporter.task("redacting", len(rows), "rows") as task:
        for row in rows:
            example, of_row = secrets.redact(row.example)
            counts.update(of_row)
            done.append(replace(row, example=example))
            task.advance()
    if counts:
        told = ", ".join(f"{count:,} {secrets.LABELS[kind]}" for kind, count in sorted(counts.items()))
        reporter.say(f"Placeholders put for {told}")
    return done, counts


def _read(files: Sequence[Path], recipe: Recipe, reporter: Reporter) -> list[Reading]:
    if recipe.data.groups:
        raise UserError(
            "versions do not keep groups yet, so the split could not keep them together",
            where="data.groups",
            fix="Name these keys in data.ignore, and put the rows of one group into one split by other means.",
        )
    if not files:
        raise UserError("no file to add", fix="Name one or more files of pairs, or list them in data.sources.")
    size = sum(source_size(path) for path in files)
    with reporter.task("reading", size, "bytes") as task:
        readings = [read_pairs(path, recipe.data, task) for path in files]
    for reading in readings:
        for note in reading.notes:
            reporter.say(note)
    return readings


def _merge(dataset: Path, rows: Sequence[SourceRow], similarity: float, reporter: Reporter) -> _Merge:
    parent = load_version(dataset) if has_version(dataset) else None
    known = {m.key: m.example for m in parent.members} if parent else {}
    replacing = replaced(dataset, parent.manifest) if parent else {}
    edited = {old: now for old, now in replacing.items() if old not in known and now in known}
    first: dict[str, SourceRow] = {}
    for row in rows:
        if row.example.pair_key not in known and row.example.pair_key not in edited:
            first.setdefault(row.example.pair_key, row)
    again = {_turns(row.example) for row in rows if row.example.pair_key in known}
    there = {_turns(example): key for key, example in known.items() if _turns(example) not in again}
    # By weights (what is masked anywhere is masked) and key, so that the order of rows in the files decides nothing.
    new = sorted(first, key=lambda key: (sum(m.weight for m in first[key].example.messages), key))
    reweighted: dict[str, str] = {}
    for key in new:
        old = there.pop(_turns(first[key].example), None)
        if old is not None:
            reweighted[key] = old
            del known[old]
    keys = [*known, *reweighted, *(key for key in new if key not in reweighted)]
    examples = [known[key] if key in known else first[key].example for key in keys]
    repeats = find_duplicates(examples, len(known) + len(reweighted), similarity, reporter)
    dropped = {keys[row]: (keys[repeat.of], repeat.similarity) for row, repeat in repeats.items()}
    kept = {key: example for key, example in zip(keys, examples, strict=True) if key not in dropped}
    return _Merge(parent, kept, first, dropped, reweighted, edited)


def _turns(example: Example) -> tuple[tuple[str, str], ...]:
    return tuple((m.role, m.content) for m in example.messages)


def _members(merge: _Merge, recipe: Recipe, reporter: Reporter) -> list[Member]:
    keys = sorted(merge.kept)
    names = find_clusters([merge.kept[key] for key in keys], recipe.data.similarity, reporter)
    clusters: dict[str, list[str]] = defaultdict(list)
    for key, name in zip(keys, names, strict=True):
        clusters[name].append(key)
    outputs = {key: merge.kept[key].output.strip() for key in keys}
    class_of = outputs if class_like(list(outputs.values())) else None
    splits = assign_splits(clusters, merge.former, recipe.data, recipe.seed, class_of)
    return [Member(merge.kept[key], key, splits[name], name) for key, name in zip(keys, names, strict=True)]


def _fate(row: SourceRow, merge: _Merge) -> dict[str, Any]:
    """What became of a row, as imports.jsonl tells it: known, duplicate (of which, how similar) or added."""
    key = row.example.pair_key
    if key not in merge.first:
        return {"fate": "known", "key": merge.edited.get(key, key)}
    if key in merge.dropped:
        of, similarity = merge.dropped[key]
        return {"fate": "duplicate", "key": key, "of": of, "similarity": round(similarity, 4)}
    if merge.first[key] is row:
        return {"fate": "added", "key": key}
    return {"fate": "duplicate", "key": key, "of": key, "similarity": 1.0}


def _duplicate(row: SourceRow, fate: Mapping[str, Any], merge: _Merge) -> Duplicate:
    of = fate["of"]
    return Duplicate(row.source, row.line, fate["key"], of, merge.place(of), fate["similarity"])


def _conflicts(merge: _Merge) -> tuple[Conflict, ...]:
    by_input: dict[str, list[str]] = defaultdict(list)
    for key, example in sorted(merge.kept.items()):
        by_input[example.input_key].append(key)
    return tuple(
        Conflict(
            input=merge.kept[keys[0]].input_text,
            outputs=tuple(merge.kept[key].output for key in keys),
            keys=tuple(keys),
            places=tuple(merge.place(key) for key in keys),
        )
        for keys in by_input.values()
        if len(keys) > 1
    )


def _moved(merge: _Merge, members: Sequence[Member]) -> tuple[Move, ...]:
    former = merge.former
    return tuple(Move(m.key, former[m.key], m.split) for m in members if former.get(m.key, m.split) != m.split)


def _counts(members: Sequence[Member], conflicts: int, duplicates: int, skipped: int, moved: int) -> Counts:
    clusters: dict[str, int] = defaultdict(int)
    for member in members:
        clusters[member.cluster] += 1
    sizes = {split: sum(m.split == split for m in members) for split in SPLITS}
    return Counts(
        rows=len(members),
        **sizes,
        clusters=len(clusters),
        families=sum(size > 1 for size in clusters.values()),
        conflicts=conflicts,
        duplicates=duplicates,
        skipped=skipped,
        moved=moved,
    )


def _manifest(
    merge: _Merge, members: Sequence[Member], recipe: Recipe, message: str, counts: Counts, sources: Sequence[Source]
) -> Manifest:
    data = recipe.data
    return Manifest(
        digest=members_digest(members),
        parent=merge.parent.digest if merge.parent else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        message=message,
        sources=tuple(sources),
        counts=counts,
        splits={split: keys_digest(m.key for m in members if m.split == split) for split in SPLITS},
        settings=Settings(similarity=data.similarity, dev=data.dev, test=data.test, seed=recipe.seed),
    )


def _sources(files: Sequence[Path], readings: Sequence[Reading], root: Path) -> dict[str, Source]:
    """Each file under the name it was read by; on disk it is named within the project, or by its bare name."""
    sources: dict[str, Source] = {}
    for path, reading in zip(files, readings, strict=True):
        full, home = path.resolve(), root.resolve()
        name = full.relative_to(home).as_posix() if full.is_relative_to(home) else path.name
        sha256 = source_digest(path)
        if any(other != str(path) and source.name == name for other, source in sources.items()):
            name = f"{name}@{sha256[:8]}"  # two files of one name, from different folders
        sources[str(path)] = Source(name=name, sha256=sha256, rows=len(reading.rows))
    return sources


def _imports(
    rows: Sequence[SourceRow],
    fates: Sequence[Mapping[str, Any]],
    skipped: Sequence[Fault],
    sources: Mapping[str, Source],
) -> list[dict[str, Any]]:
    """The lines of imports.jsonl: one for each row of each file, in the files' order of names and lines."""
    lines = [
        {"source": sources[row.source].name, "line": row.line, **fate} for row, fate in zip(rows, fates, strict=True)
    ]
    lines += [
        {"source": sources[f.source].name, "line": f.line, "fate": "skipped", "code": f.code, "reason": f.reason}
        for f in skipped
    ]
    return sorted(lines, key=lambda line: (line["source"], line["line"]))
