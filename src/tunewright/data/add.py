"""Adding files of pairs: read, deduplicate, cluster, split, and save as a new dataset version."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.config import Config
from tunewright.config.project import ProjectFolder
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of
from tunewright.core.workers import Workers
from tunewright.data import notices
from tunewright.data.add_options import AddOptions
from tunewright.data.add_plan import AddPlan, plan_add, prepare_add
from tunewright.data.dedup.decontaminate import ContaminationHit
from tunewright.data.dedup.output_leakage import OutputLeakage
from tunewright.data.merge import Merge
from tunewright.data.notices import Conflict, Duplicate, LargeCluster, ReplacedRow, SplitChange
from tunewright.data.readers import Fault, ReadResult, SourceRow, read_pairs, source_digest, source_size
from tunewright.data.readers.hub import hub_source
from tunewright.data.readers.preferences import REJECTED, rejected_value
from tunewright.data.readers.validate import counted
from tunewright.data.screening import screen
from tunewright.data.splits import Split
from tunewright.data.trace import read_metadata
from tunewright.data.version_builder import (
    VersionDraft,
)
from tunewright.data.versions import (
    DatasetVersion,
    Manifest,
    Settings,
    Source,
    locked,
    save_version,
)
from tunewright.data.versions.logs import KEPT_PAIRS_FILE, KeptPair, add_kept_pairs, append_removals
from tunewright.data.versions.version import ImportCounts, cluster_sizes, clusters_by_split, new_manifest


@dataclass(frozen=True)
class AddResult:
    """Result of adding files. ``version`` is current afterwards; ``created`` is true if it is new.

    ``added`` counts new examples, ``known`` rows that the previous version had already.
    """

    version: Manifest
    created: bool
    added: int
    known: int
    duplicates: tuple[Duplicate, ...]
    conflicts: tuple[Conflict, ...]
    moved: tuple[SplitChange, ...]
    skipped: tuple[Fault, ...]
    redacted: dict[str, int]
    """Secrets and personal data that placeholders replaced: counts by kind."""
    personal: dict[str, int]
    """Personal data left in, and secrets that ``data.allow`` permits: counts by kind."""
    contaminated: tuple[ContaminationHit, ...]
    """Training rows that contain a test row or a benchmark item; left out if data.contaminated is "drop"."""
    left_out: int
    """Number of contaminated rows left out."""
    unaccepted: int
    """Number of generated rows left out, because they share a cluster with held-out rows and nobody accepted them."""
    largest: tuple[LargeCluster, ...]
    """The largest clusters."""
    outputs: OutputLeakage
    """Test rows with an output, or its template, that training rows have too."""
    clusters: dict[Split, int]
    """Independent clusters of each split, without the mix-in."""
    dev_clusters: tuple[int, ...]
    """Rows of each dev cluster, the largest first."""
    near_duplicates: tuple[Duplicate, ...] = ()
    """New rows with nearly the same input as another row and its output; kept, in its cluster."""
    replaced: tuple[ReplacedRow, ...] = ()
    """Rows that replaced known ones with the same input and another output."""
    removed: tuple[str, ...] = ()
    """Places of rows that were removed earlier and stay out."""
    superseded: tuple[str, ...] = ()
    """Places of rows that an earlier ``replace`` superseded and that stay out; not counted as known."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        outputs, version = self.outputs.as_dict(), self.version.model_dump(mode="json")
        return {**asdict(self), "outputs": outputs, "version": version}


def add(
    project: ProjectFolder,
    files: Iterable[str | Path],
    reporter: Reporter,
    options: AddOptions = AddOptions(),
    *,
    message: str = "",
    workers: Workers | None = None,
) -> AddResult:
    """Add files of pairs to the project's dataset; known rows change nothing.

    With ``options.replace`` the output of a known input replaces the one in the dataset, and its split is kept. For an
    input with several outputs, the files must have at least as many, which replace them all.

    Args:
        project: its config names columns, groups, system turn, similarity, shares, mix-in, benchmarks and seed.
        files: files, folders, patterns and datasets of the hub, as ``source_files`` expands them.
        reporter: receives warnings on rows left out, moved or doubtful.
        message: stored with the version.
        workers: check and compare the rows (None: those of ``compute.cluster``).

    Raises:
        UserError: faulty rows, secrets (named by place, never by value), new conflicts (unless data.conflicts accepts
            them), an unreadable file, too few rows to split, a dataset changed by hand, a full disk. The dataset is
            then unchanged.
    """
    with prepare_add(project, files, reporter, options, workers) as (project, paths, workers):
        config = project.config
        inputs = _read(paths, config, reporter, workers, skip_bad=options.skip_bad)
        screened = screen(
            inputs.rows,
            config.data.allow,
            reporter,
            redact=options.redact,
            presidio=options.presidio,
            workers=workers,
        )
        with locked(project.dataset):
            planned = plan_add(project, screened.rows, reporter, options, workers=workers)
            version = _save(project, inputs, planned, reporter, message=message)
    rows, merged, draft = planned.rows, planned.merged, planned.draft
    fates = Counter(draft.fate(row, merged)["fate"] for row in rows)
    return AddResult(
        version=version,
        created=planned.created,
        added=fates["added"],
        known=fates["known"] - len(planned.superseded),
        duplicates=planned.duplicates,
        conflicts=planned.conflicts,
        moved=draft.moved,
        skipped=tuple(inputs.faults),
        redacted=screened.redacted,
        personal=screened.personal,
        contaminated=draft.hits,
        left_out=len(draft.left_out),
        unaccepted=len(draft.unaccepted),
        largest=draft.largest,
        outputs=draft.outputs,
        near_duplicates=planned.near,
        replaced=merged.replaced(),
        removed=tuple(f"{row.source}:{row.line}" for row in rows if row.example.pair_key in merged.withheld),
        superseded=tuple(f"{row.source}:{row.line}" for row in planned.superseded),
        clusters=clusters_by_split(draft.members),
        dev_clusters=cluster_sizes(draft.members, "dev"),
    )


def _save(
    project: ProjectFolder, inputs: _InputFiles, planned: AddPlan, reporter: Reporter, *, message: str
) -> Manifest:
    """Write the planned version, unless it is the current one."""
    merged, draft = planned.merged, planned.draft
    if not planned.created:
        assert merged.parent is not None
        if message:
            reporter.warn("The message was not stored: nothing is new, so no version was created.")
        _keep_known(project, inputs, planned, merged.parent, reporter)
        return merged.parent.manifest
    sources = _sources(inputs, project.root)
    with reporter.task("counting", len(draft.members), "examples") as task:
        version = new_manifest(
            draft.members,
            merged.parent,
            _settings(project.config, merged.parent),
            message=message,
            sources=list(sources.values()),
            left_out=ImportCounts(len(planned.duplicates), len(inputs.faults), len(draft.moved)),
            mix=draft.mixed.about if draft.mixed else None,
            near_duplicates=_near_count(merged, draft, project.config),
            split_from=planned.inherited.about if planned.inherited else None,
        )
        task.advance(len(draft.members))
    imports = _Imports(planned.rows, inputs.faults, sources, merged, draft)
    if kept := Counter(key for line in imports for key in line.get("metadata", ())):
        reporter.say(f"Kept as metadata: {counted(kept)}")
    version = save_version(project.dataset, version, draft.members, imports, reporter)
    append_removals(project.dataset, [removal.restored(project.root) for removal in planned.restored])
    return version


def _keep_known(
    project: ProjectFolder, inputs: _InputFiles, planned: AddPlan, parent: DatasetVersion, reporter: Reporter
) -> None:
    """Keep the rejected answers of known rows as preference pairs, and warn of metadata that is not stored."""
    known = read_metadata(project.dataset, parent.manifest)
    sources = _sources(inputs, project.root)
    pairs, other = [], 0
    for row in planned.rows:
        fate = planned.draft.fate(row, planned.merged) if row.metadata else {}
        if fate.get("fate") != "known":
            continue
        key = str(fate["key"])
        before = known.get(key, [])
        if REJECTED in row.metadata and all(each.get(REJECTED) != row.metadata[REJECTED] for each in before):
            pairs.append(
                KeptPair(
                    key=key,
                    input=row.example.input_key,
                    chosen=rejected_value(row.example.messages[-1:]),
                    rejected=row.metadata[REJECTED],
                    kind="file",
                    by=f"{sources[row.source].name}:{row.line}",
                    when=now(),
                    version=parent.digest,
                )
            )
        others = [_without_rejected(each) for each in before]
        new = _without_rejected(row.metadata)
        other += bool(new) and new not in others
    if kept := add_kept_pairs(project.dataset, pairs):
        reporter.say(f"Kept {count_of(kept, 'preference pair')} of known rows (dataset/{KEPT_PAIRS_FILE})")
    if other:
        reporter.warn(
            f"The metadata of {count_of(other, 'known row')} was not stored: nothing else is new, so no version "
            "was created."
        )


def _without_rejected(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name != REJECTED}


@dataclass(frozen=True)
class _InputFiles:
    """The files to add, and the rows read from each."""

    files: Sequence[Path]
    readings: Sequence[ReadResult]

    @property
    def rows(self) -> list[SourceRow]:
        return [row for reading in self.readings for row in reading.rows]

    @property
    def faults(self) -> list[Fault]:
        return [fault for reading in self.readings for fault in reading.faults]


def _read(
    files: Sequence[Path], config: Config, reporter: Reporter, workers: Workers, *, skip_bad: bool
) -> _InputFiles:
    if not files:
        raise UserError("No file to add", fix="Name one or more files of pairs, or list them in data.sources.")
    size = sum(source_size(path) for path in files)
    with reporter.task("reading", size, "bytes") as task:
        inputs = _InputFiles(files, [read_pairs(path, config.data, task, workers) for path in files])
    for reading in inputs.readings:
        for note in reading.notes:
            reporter.say(note)
    if inputs.faults and not skip_bad:
        raise notices.faulty(inputs.faults)
    if inputs.faults:
        reporter.warn(notices.skipped(inputs.faults))
    return inputs


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


def _near_count(merged: Merge, draft: VersionDraft, config: Config) -> int:
    if config.data.duplicates == "drop":  # new ones are left out, so those of the version before are all there are
        return merged.parent.manifest.counts.near_duplicates if merged.parent else 0
    return sum(m.key in merged.near for m in draft.members)


def _sources(inputs: _InputFiles, root: Path) -> dict[str, Source]:
    """Map each file's name in messages to its source record, named relative to the project or by its file name."""
    sources: dict[str, Source] = {}
    for path, reading in zip(inputs.files, inputs.readings, strict=True):
        full, home = path.resolve(), root.resolve()
        name = full.relative_to(home).as_posix() if full.is_relative_to(home) else hub_source(path) or path.name
        name += reading.source.removeprefix(str(path))  # the sheet of a workbook
        sha256 = source_digest(path)
        if any(other != reading.source and source.name == name for other, source in sources.items()):
            name = f"{name}@{sha256[:8]}"  # two files of one name, from different folders
        sources[reading.source] = Source(name=name, sha256=sha256, rows=len(reading.rows))
    return sources


@dataclass(frozen=True)
class _Imports:
    """The lines of imports.jsonl: one per row of each file, sorted by file and line.

    They are made when they are read: ten million of them would take more memory than the rows.
    """

    rows: Sequence[SourceRow]
    skipped: Sequence[Fault]
    sources: Mapping[str, Source]
    merged: Merge
    draft: VersionDraft

    def __iter__(self) -> Iterator[dict[str, Any]]:
        found: dict[str, list[SourceRow | Fault | _MixRow]] = defaultdict(list)
        for row in self.rows:
            found[self.sources[row.source].name].append(row)
        for fault in self.skipped:
            found[self.sources[fault.source].name].append(fault)
        if mixed := self.draft.mixed:
            name = mixed.about.source.name
            found[name] += [_MixRow(row, None) for row in mixed.rows]
            found[name] += [_MixRow(row, reason) for row, reason in mixed.left_out]
        for name in sorted(found):
            for item in sorted(found[name], key=lambda item: item.line):
                yield {"source": name, "line": item.line, **self._fate(item)}

    def _fate(self, item: SourceRow | Fault | _MixRow) -> dict[str, Any]:
        if isinstance(item, _MixRow):
            return item.fate
        if isinstance(item, Fault):
            return {"fate": "skipped", "code": item.code, "reason": item.reason}
        fate = self.draft.fate(item, self.merged)
        # Rows that stay out get no metadata: a purge erases metadata by the keys of rows that were in a version.
        if item.metadata and fate["fate"] not in ("removed", "contaminated", "unaccepted"):
            fate["metadata"] = item.metadata
        return fate


@dataclass(frozen=True)
class _MixRow:
    """A row that was drawn for the mix-in, with the reason if it was left out."""

    row: SourceRow
    reason: str | None

    @property
    def line(self) -> int:
        return self.row.line

    @property
    def fate(self) -> dict[str, Any]:
        key = self.row.example.pair_key
        if self.reason is None:
            return {"fate": "mixed", "key": key}
        return {"fate": "not mixed", "key": key, "reason": self.reason}
