"""Adding files of pairs: read, drop what repeats, cluster, split, and save as a new dataset version."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.config import Config
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.wording import count_of
from tunewright.data import notices
from tunewright.data.arrivals import held_out, lifted, restored
from tunewright.data.dedup.decontaminate import Hit
from tunewright.data.dedup.output_leakage import OutputLeak
from tunewright.data.inheriting import Inherited, inherit, refuse_torn_templates, told
from tunewright.data.merge import Merge, merge
from tunewright.data.notices import Conflict, Duplicate, Largest, Move, Replaced
from tunewright.data.readers import Fault, Reading, SourceRow, read_pairs, source_digest, source_size
from tunewright.data.readers.metadata import counted
from tunewright.data.screening import screen
from tunewright.data.splits import Split
from tunewright.data.version_builder import VersionBuilder, contents
from tunewright.data.versions import (
    DatasetVersion,
    Manifest,
    Settings,
    Source,
    locked,
    members_digest,
    save_version,
)
from tunewright.data.versions.making import LeftOut, cluster_sizes, clusters_by_split, new_manifest
from tunewright.data.versions.origins import read_metadata
from tunewright.data.versions.removals import Removal, append_removals


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
    """How much personal data, by kind, was left in, with secrets that ``data.allow`` let through."""
    contaminated: tuple[Hit, ...]
    """Training rows that hold a test row or a benchmark item; left out where data.contaminated is "drop"."""
    left_out: int
    """How many of them were left out."""
    largest: tuple[Largest, ...]
    """The largest clusters."""
    outputs: OutputLeak
    """How many test rows have an output, or its template, that training rows have too."""
    clusters: dict[Split, int]
    """How many independent clusters each split has, mix-in apart."""
    dev_clusters: tuple[int, ...]
    """Rows of each dev cluster, the largest first."""
    near_duplicates: tuple[Duplicate, ...] = ()
    """New rows with nearly the input and the output of another: kept, in its cluster."""
    replaced: tuple[Replaced, ...] = ()
    """Rows that took the place of known ones with their input and another output."""
    removed: tuple[str, ...] = ()
    """Where the rows were read that were removed earlier and stay out."""
    superseded: tuple[str, ...] = ()
    """Where the rows were read that an earlier ``replace`` took out and that stay out; not counted as known."""

    def as_dict(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        outputs, version = self.outputs.as_dict(), self.version.model_dump(mode="json")
        return {**asdict(self), "outputs": outputs, "version": version}


def add(
    project: ProjectFolder,
    files: Sequence[Path],
    reporter: Reporter,
    *,
    skip_bad: bool = False,
    redact: bool = False,
    presidio: str | None = None,
    message: str = "",
    replace: bool = False,
    restore: bool = False,
    split_from: Path | None = None,
) -> AddResult:
    """Add files of pairs to the project's dataset; rows that it has already change nothing.

    Args:
        project: its config names columns, groups, system turn, similarity, shares, mix-in, benchmarks and seed.
        files: files that ``read_pairs`` reads.
        reporter: is warned of all that is left out, moved or doubtful.
        skip_bad: leave faulty rows out, with a warning by cause, instead of refusing.
        redact: put placeholders for secrets and personal data, instead of refusing secrets.
        presidio: a spaCy model with which presidio looks for names and places too (``open_presidio``).
        message: kept with the version.
        replace: the output of a known input supersedes the one that the dataset has; its split is kept. Of an input
            with several outputs, the files must have at least as many, which replace them all.
        restore: take rows in again that were removed or superseded earlier.
        split_from: a project or dataset folder whose rows keep their split in this new dataset.

    Raises:
        UserError: faulty rows (all are listed), secrets (named by place, never by value), new conflicts (unless
            data.conflicts accepts them), a file that cannot be read, too few rows to split, a dataset that was changed
            by hand, a full disk. The dataset is then as it was.
    """
    config = project.config
    given = _read(files, config, reporter, skip_bad=skip_bad)
    screened = screen(given.rows, config.data.allow, reporter, redact=redact, presidio=presidio)
    with locked(project.dataset):
        planned = plan(project, screened.rows, reporter, Arrival(replace, restore, split_from))
        version = _save(project, given, planned, reporter, message=message)
    rows, merged, found = planned.rows, planned.merged, planned.found
    fates = Counter(found.fate(row, merged)["fate"] for row in rows)
    return AddResult(
        version=version,
        created=planned.created,
        added=fates["added"],
        known=fates["known"] - len(planned.superseded),
        duplicates=planned.duplicates,
        conflicts=planned.conflicts,
        moved=found.moved,
        skipped=tuple(given.faults),
        redacted=screened.redacted,
        personal=screened.personal,
        contaminated=found.hits,
        left_out=len(found.left_out),
        largest=found.largest,
        outputs=found.outputs,
        near_duplicates=planned.near,
        replaced=merged.replaced(),
        removed=tuple(f"{row.source}:{row.line}" for row in rows if row.example.pair_key in merged.withheld),
        superseded=tuple(f"{row.source}:{row.line}" for row in planned.superseded),
        clusters=clusters_by_split(found.members),
        dev_clusters=cluster_sizes(found.members, "dev"),
    )


@dataclass(frozen=True)
class Arrival:
    """How rows come in: see :func:`add`."""

    replace: bool = False
    restore: bool = False
    split_from: Path | None = None


@dataclass(frozen=True)
class Plan:
    """The version that some rows would make; nothing is written yet."""

    rows: Sequence[SourceRow]
    merged: Merge
    conflicts: tuple[Conflict, ...]
    duplicates: tuple[Duplicate, ...]
    near: tuple[Duplicate, ...]
    found: VersionBuilder
    inherited: Inherited | None
    restored: Sequence[Removal]

    @property
    def fresh_conflicts(self) -> list[Conflict]:
        """The conflicts that a new row is part of."""
        return self.merged.fresh(self.conflicts)

    @property
    def superseded(self) -> list[SourceRow]:
        """The rows that an earlier replacement took out, and that stay out."""
        gone = self.merged.superseded & self.merged.edited.keys()
        return [row for row in self.rows if row.example.pair_key in gone]

    @property
    def created(self) -> bool:
        """True if it differs from the current version."""
        return self.merged.parent is None or self.merged.parent.digest != members_digest(self.found.members)


def plan(
    project: ProjectFolder,
    rows: Sequence[SourceRow],
    reporter: Reporter,
    arrival: Arrival,
    *,
    refuse_conflicts: bool = True,
) -> Plan:
    """Merge screened rows into the current version, cluster and split them, without writing anything.

    Args:
        project: as for ``add``.
        rows: the rows to add.
        reporter: is warned of all that would be left out, moved or doubtful.
        arrival: as for ``add``.
        refuse_conflicts: refuse new conflicts, unless data.conflicts accepts them; else ``fresh_conflicts`` has them.

    Raises:
        UserError: new conflicts, too few rows to split, a dataset that was
            changed by hand.
    """
    data = project.config.data
    merged = merge(
        project.dataset,
        rows,
        data.dedup_threshold,
        reporter,
        duplicates=data.duplicates,
        replace=arrival.replace,
        restore=arrival.restore,
        accept=data.conflicts == "accept",
    )
    rows = merged.rows
    conflicts = merged.conflicts()
    accepted = data.conflicts == "accept"
    if refuse_conflicts and not accepted and (fresh := merged.fresh(conflicts)):
        raise merged.refusal(fresh)
    duplicates = merged.duplicates(rows)
    if duplicates:
        reporter.warn(notices.duplicates(duplicates, data.duplicates))
    _tell_of_arrivals(merged, rows, arrival, reporter)
    inherited = inherit(arrival.split_from, merged.parent, merged.kept) if arrival.split_from is not None else None
    if inherited and data.split_by == "output_template":
        refuse_torn_templates(inherited, merged.kept)
    found = contents(project, merged, rows, reporter, inherited.splits if inherited else None)
    if inherited:
        reporter.say(told(inherited, found.members))
    near = merged.near_duplicates({m.key for m in found.members})
    if near:
        reporter.say(notices.near_duplicates(near))
    back = restored(project.dataset, [merged.first[key] for key in merged.first if key in merged.kept])
    if arrival.restore and not back and not merged.superseded:
        reporter.say("Nothing to restore: no row of these files was removed earlier.")
    planned = Plan(rows, merged, conflicts, duplicates, near, found, inherited, back)
    if planned.superseded:
        reporter.say(notices.superseded(planned.superseded))
    if planned.created:
        _warn(merged, found, merged.fresh(conflicts) if accepted else [], reporter)
    return planned


def _tell_of_arrivals(merged: Merge, rows: Sequence[SourceRow], arrival: Arrival, reporter: Reporter) -> None:
    """Report rows that stay out, replace others or have other weights."""
    if merged.withheld:
        reporter.warn(held_out(rows, merged.withheld))
    if arrival.replace and not merged.replacement.olds:
        reporter.say("Nothing to replace: no input of these files is in the dataset with another output.")
    if merged.replacement.standing:
        reporter.warn(notices.standing(merged.replacement.standing))
    if merged.replacement.olds:
        reporter.say(notices.replaced(merged.replaced()))
        tested = sum(merged.former.get(key) == "test" for key in merged.replacement.olds)
        if tested:
            reporter.warn(f"Of the test, {tested:,} replaced: scores of the two versions cannot be compared.")
    if merged.replacement.sets.inputs:
        reporter.say(f"{merged.replacement.sets}.")
    if merged.reweighted:
        reporter.warn(notices.reweighted([merged.kept[key] for key in merged.reweighted]))


def _save(project: ProjectFolder, given: _Given, planned: Plan, reporter: Reporter, *, message: str) -> Manifest:
    """Write the planned version, unless it is the current one already."""
    merged, found = planned.merged, planned.found
    if not planned.created:
        assert merged.parent is not None
        if message:
            reporter.warn("Nothing is new, so there is no version to keep the message with.")
        known = read_metadata(project.dataset, merged.parent.manifest)
        fates = [(row, found.fate(row, merged)) for row in planned.rows if row.metadata]
        there = [(row.metadata, fate["key"]) for row, fate in fates if fate["fate"] == "known"]
        other = sum(metadata not in known.get(key, []) for metadata, key in there)
        if other:
            reporter.warn(
                f"The metadata of {count_of(other, 'known row')} is not kept: nothing else is new, "
                "so there is no new version to keep it with."
            )
        return merged.parent.manifest
    sources = _sources(given, project.root)
    version = new_manifest(
        found.members,
        merged.parent,
        _settings(project.config, merged.parent),
        message=message,
        sources=list(sources.values()),
        left_out=LeftOut(len(planned.duplicates), len(given.faults), len(found.moved)),
        mix=found.mixed.about if found.mixed else None,
        near_duplicates=_near_count(merged, found, project.config),
        split_from=planned.inherited.about if planned.inherited else None,
    )
    imports = _imports(planned.rows, given.faults, sources, merged, found)
    if kept := Counter(key for line in imports for key in line.get("metadata", ())):
        reporter.say(f"Kept as metadata: {counted(kept)}")
    version = save_version(project.dataset, version, found.members, imports, reporter)
    append_removals(project.dataset, [lifted(removal, project.root) for removal in planned.restored])
    return version


@dataclass(frozen=True)
class _Given:
    """The files that are added, and what was read from each."""

    files: Sequence[Path]
    readings: Sequence[Reading]

    @property
    def rows(self) -> list[SourceRow]:
        return [row for reading in self.readings for row in reading.rows]

    @property
    def faults(self) -> list[Fault]:
        return [fault for reading in self.readings for fault in reading.faults]


def _read(files: Sequence[Path], config: Config, reporter: Reporter, *, skip_bad: bool) -> _Given:
    if not files:
        raise UserError("no file to add", fix="Name one or more files of pairs, or list them in data.sources.")
    size = sum(source_size(path) for path in files)
    with reporter.task("reading", size, "bytes") as task:
        given = _Given(files, [read_pairs(path, config.data, task) for path in files])
    for reading in given.readings:
        for note in reading.notes:
            reporter.say(note)
    if given.faults and not skip_bad:
        raise notices.faulty(given.faults)
    if given.faults:
        reporter.warn(notices.skipped(given.faults))
    return given


def _settings(config: Config, parent: DatasetVersion | None) -> Settings:
    data = config.data
    before = parent is not None and parent.manifest.settings.conflicts == "accept"
    return Settings(
        dedup_threshold=data.dedup_threshold,
        val_size=data.val_size,
        test_size=data.test_size,
        seed=config.seed,
        group_by=data.group_by,
        conflicts="accept" if before else data.conflicts,
        split_by=data.split_by,
        duplicates=data.duplicates,
    )


def _near_count(merged: Merge, found: VersionBuilder, config: Config) -> int:
    if config.data.duplicates == "drop":  # new ones are left out, so those of the version before are all there are
        return merged.parent.manifest.counts.near_duplicates if merged.parent else 0
    return sum(m.key in merged.near for m in found.members)


def _warn(merged: Merge, contents: VersionBuilder, accepted: Sequence[Conflict], reporter: Reporter) -> None:
    parent: DatasetVersion | None = merged.parent
    notices.warn_of_another_system_turn(
        [m.example for m in parent.domain] if parent else [],
        [merged.kept[key] for key in merged.first if key in merged.kept],
        reporter,
    )
    domain = [m for m in contents.members if not m.mixed]
    notices.warn_of_contents(domain, accepted, contents.moved, contents.largest, reporter)
    if contents.largest:
        reporter.say(notices.largest(contents.largest))
    if contents.held and not contents.left_out:
        reporter.warn(notices.contaminated(contents.held, dropping=False))
    notices.warn_of_untrained_answers(domain, reporter)
    if contents.outputs.high:
        reporter.warn(notices.known_outputs(contents.outputs))
    if contents.mixed:
        about, wanted, left_out = contents.mixed.about, contents.mixed.wanted, contents.mixed.left_out
        if about.drawn < wanted:
            reporter.warn(
                f"{about.source.name} gives {about.drawn:,} rows to mix in, not the {wanted:,} that data.mix asks for."
            )
        if left_out:
            reporter.warn(notices.not_mixed([(f"{row.source}:{row.line}", reason) for row, reason in left_out]))
        reporter.say(f"Mixed in: {about.drawn:,} of {about.source.rows:,} rows of {about.source.name}, to train on")


def _sources(given: _Given, root: Path) -> dict[str, Source]:
    """Return each file under the name it was read by; on disk it is named within the project, or by its bare name."""
    sources: dict[str, Source] = {}
    for path, reading in zip(given.files, given.readings, strict=True):
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
    contents: VersionBuilder,
) -> list[dict[str, Any]]:
    """Return the lines of imports.jsonl: one for each row of each file, in the files' order of names and lines."""
    lines = [
        {
            "source": sources[row.source].name,
            "line": row.line,
            **contents.fate(row, merged),
        }
        for row in rows
    ]
    for line, row in zip(lines, rows, strict=True):
        # Rows that stay out have none: a purge erases metadata by the keys of rows that were in.
        if row.metadata and line["fate"] not in ("removed", "contaminated"):
            line["metadata"] = row.metadata
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
