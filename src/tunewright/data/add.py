"""Adding files of pairs: read, drop what repeats, cluster, split, and save as a new dataset version."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunewright.data import notices, secrets
from tunewright.data.formats import Fault, Reading, SourceRow, read_pairs, source_digest, source_size
from tunewright.data.merge import Merge, merge
from tunewright.data.mixing import Mixed, mix_in
from tunewright.data.neighbours import find_clusters, largest_clusters
from tunewright.data.neighbours.decontaminate import Hit, How, item_names, read_items, training_hits
from tunewright.data.notices import Conflict, Duplicate, Largest, Move
from tunewright.data.review.suspects import class_like
from tunewright.data.splits import assign_splits, join_groups
from tunewright.data.versions import (
    DatasetVersion,
    Manifest,
    Member,
    Settings,
    Source,
    locked,
    members_digest,
    save_version,
)
from tunewright.data.versions.making import LeftOut, new_manifest, renamed
from tunewright.errors import UserError
from tunewright.progress import Reporter
from tunewright.project import Project
from tunewright.recipe import Recipe

_LARGEST = 5


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
    contaminated: tuple[Hit, ...]
    """Training rows that hold a test row or a benchmark item; left out where data.contaminated is "drop"."""
    largest: tuple[Largest, ...]
    """The largest clusters."""

    def as_dict(self) -> dict[str, Any]:
        """The result as ``--json`` prints it."""
        return {**asdict(self), "version": self.version.model_dump(mode="json")}


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
        project: its recipe names columns, groups, system turn, similarity, shares, mix-in, benchmarks and seed.
        files: files that ``read_pairs`` reads.
        reporter: is warned of all that is left out, moved or doubtful.
        skip_bad: leave faulty rows out, each named, instead of refusing.
        redact: put placeholders for secrets and personal data, instead of refusing secrets.
        message: kept with the version.

    Raises:
        UserError: faulty rows (all are listed), secrets (named by place, never by value), new conflicts (unless
            data.conflicts accepts them), a file that cannot be read, too few rows to split, a dataset that was changed
            by hand, a full disk. The dataset is then as it was.
    """
    recipe = project.recipe
    readings = _read(files, recipe, reporter)
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
        merged = merge(project.dataset, rows, recipe.data.similarity, reporter)
        conflicts = _settled(merged, recipe)
        duplicates = merged.duplicates(rows)
        if duplicates:
            reporter.warn(notices.duplicates(duplicates))
        if merged.reweighted:
            reporter.warn(notices.reweighted([merged.kept[key] for key in merged.reweighted]))
        contents = _contents(project, merged, rows, reporter)
        created = merged.parent is None or merged.parent.digest != members_digest(contents.members)
        if created:
            sources = _sources(files, readings, project.root)
            version = new_manifest(
                contents.members,
                merged.parent,
                _settings(recipe),
                message=message,
                sources=list(sources.values()),
                left_out=LeftOut(len(duplicates), len(skipped), len(contents.moved)),
                mix=contents.mixed.about if contents.mixed else None,
            )
            _warn(merged, contents, conflicts, reporter)
            imports = _imports(rows, skipped, sources, merged, contents)
            version = save_version(project.dataset, version, contents.members, imports, reporter)
        else:
            assert merged.parent is not None
            version = merged.parent.manifest
            if message:
                reporter.warn("Nothing is new, so there is no version to keep the message with.")
    fates = Counter(contents.fate(row, merged)["fate"] for row in rows)
    return AddResult(
        version=version,
        created=created,
        added=fates["added"],
        known=fates["known"],
        duplicates=duplicates,
        conflicts=conflicts,
        moved=contents.moved,
        skipped=tuple(skipped),
        redacted=dict(redacted),
        personal=personal,
        contaminated=contents.hits,
        largest=contents.largest,
    )


@dataclass(frozen=True)
class _Contents:
    """What a new version would hold, mix-in included, and what was found on the way."""

    members: list[Member]
    moved: tuple[Move, ...]
    hits: tuple[Hit, ...]
    held: list[tuple[str, How, str]]  # the hits as people read them
    left_out: frozenset[str]  # pair keys of training rows that hold an item of a test or benchmark
    mixed: Mixed | None
    largest: tuple[Largest, ...]

    def fate(self, row: SourceRow, merged: Merge) -> dict[str, Any]:
        """What became of a row that was read."""
        fate = merged.fate(row)
        return {**fate, "fate": "contaminated"} if fate.get("of", fate["key"]) in self.left_out else fate


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
    if not files:
        raise UserError("no file to add", fix="Name one or more files of pairs, or list them in data.sources.")
    size = sum(source_size(path) for path in files)
    with reporter.task("reading", size, "bytes") as task:
        readings = [read_pairs(path, recipe.data, task) for path in files]
    for reading in readings:
        for note in reading.notes:
            reporter.say(note)
    return readings


def _settled(merged: Merge, recipe: Recipe) -> tuple[Conflict, ...]:
    """All conflicts, of which none is both new and not accepted."""
    conflicts = merged.conflicts()
    fresh = [conflict for conflict in conflicts if any(key in merged.first for key in conflict.keys)]
    if fresh and recipe.data.conflicts == "error":
        raise notices.conflicting(fresh)
    return conflicts


def _contents(project: Project, merged: Merge, rows: Sequence[SourceRow], reporter: Reporter) -> _Contents:
    recipe = project.recipe
    domain = _domain(merged, rows, recipe, reporter)
    benchmarks = {name: read_items(project.root / name) for name in recipe.data.benchmarks}
    # Phrases that rows share with an item are left to `data leak`.
    hits = tuple(hit for hit in training_hits(domain, benchmarks, reporter) if hit.how != "overlap")
    items = item_names(hits, domain)
    held = [(merged.place(hit.row), hit.how, item) for hit, item in zip(hits, items, strict=True)]
    left_out: frozenset[str] = frozenset()
    if hits and recipe.data.contaminated == "drop":
        reporter.warn(notices.contaminated(held, dropping=True))
        left_out = frozenset(hit.row for hit in hits)
        domain = renamed([m for m in domain if m.key not in left_out])
    former = merged.former
    moved = tuple(Move(m.key, former[m.key], m.split) for m in domain if former.get(m.key, m.split) != m.split)
    mix = recipe.data.mix
    mixed = mix_in(project.root, recipe, mix, domain, benchmarks, reporter) if mix else None
    families = largest_clusters([m.example for m in domain], [m.cluster for m in domain], _LARGEST)
    largest = tuple(
        Largest(f.rows, domain[f.ends[0]].example.input_text, domain[f.ends[1]].example.input_text, f.similarity)
        for f in families
    )
    members = sorted([*domain, *(mixed.members if mixed else [])], key=lambda m: m.key)
    return _Contents(members, moved, hits, held, left_out, mixed, largest)


def _domain(merged: Merge, rows: Sequence[SourceRow], recipe: Recipe, reporter: Reporter) -> list[Member]:
    """The rows of the domain with clusters, joined where they share a group, and splits."""
    keys = sorted(merged.kept)
    names = find_clusters([merged.kept[key] for key in keys], recipe.data.similarity, reporter)
    clusters: dict[str, list[str]] = defaultdict(list)
    for key, name in zip(keys, names, strict=True):
        clusters[name].append(key)
    groups = merged.groups(rows)
    notices.warn_of_missing_groups(recipe.data.groups, merged.parent, groups, reporter)
    clusters = join_groups(clusters, groups)
    cluster_of = {key: name for name, members in clusters.items() for key in members}
    outputs = {key: merged.kept[key].output.strip() for key in keys}
    class_of = outputs if class_like(list(outputs.values())) else None
    splits = assign_splits(clusters, merged.former, recipe.data, recipe.seed, class_of)
    return [
        Member(merged.kept[key], key, splits[cluster_of[key]], cluster_of[key], groups.get(key, ())) for key in keys
    ]


def _settings(recipe: Recipe) -> Settings:
    data = recipe.data
    return Settings(similarity=data.similarity, dev=data.dev, test=data.test, seed=recipe.seed, groups=data.groups)


def _warn(merged: Merge, contents: _Contents, conflicts: Sequence[Conflict], reporter: Reporter) -> None:
    parent: DatasetVersion | None = merged.parent
    notices.warn_of_another_system_turn(
        [m.example for m in parent.domain] if parent else [],
        [merged.kept[key] for key in merged.first if key in merged.kept],
        reporter,
    )
    domain = [m for m in contents.members if not m.mixed]
    notices.warn_of_contents(domain, conflicts, contents.moved, contents.largest, merged.first.keys(), reporter)
    if contents.largest:
        reporter.say(notices.largest(contents.largest))
    if contents.held and not contents.left_out:
        reporter.warn(notices.contaminated(contents.held, dropping=False))
    if contents.mixed:
        about, wanted, left_out = contents.mixed.about, contents.mixed.wanted, contents.mixed.left_out
        if about.drawn < wanted:
            reporter.warn(
                f"{about.source.name} gives {about.drawn:,} rows to mix in, not the {wanted:,} that data.mix asks for."
            )
        if left_out:
            reporter.warn(notices.not_mixed([(f"{row.source}:{row.line}", reason) for row, reason in left_out]))
        reporter.say(f"Mixed in: {about.drawn:,} of {about.source.rows:,} rows of {about.source.name}, to train on")


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
    skipped: Sequence[Fault],
    sources: Mapping[str, Source],
    merged: Merge,
    contents: _Contents,
) -> list[dict[str, Any]]:
    """The lines of imports.jsonl: one for each row of each file, in the files' order of names and lines."""
    lines = [{"source": sources[row.source].name, "line": row.line, **contents.fate(row, merged)} for row in rows]
    lines += [
        {"source": sources[f.source].name, "line": f.line, "fate": "skipped", "code": f.code, "reason": f.reason}
        for f in skipped
    ]
    if contents.mixed:
        name = contents.mixed.about.source.name
        lines += [
            {"source": name, "line": row.line, "fate": "mixed", "key": row.example.pair_key}
            for row in contents.mixed.rows
        ]
        lines += [
            {"source": name, "line": row.line, "fate": "not mixed", "key": row.example.pair_key, "reason": reason}
            for row, reason in contents.mixed.left_out
        ]
    return sorted(lines, key=lambda line: (line["source"], line["line"]))
