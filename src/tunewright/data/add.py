"""Adding files of pairs: read, deduplicate, cluster, split, and save as a new dataset version."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.compute import open_workers
from tunewright.config import DataConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of
from tunewright.core.workers import Workers
from tunewright.data import notices
from tunewright.data.add_plan import AddPlan, plan_add
from tunewright.data.dedup.decontaminate import ContaminationHit
from tunewright.data.dedup.output_leakage import OutputLeakage
from tunewright.data.given_split import (
    OverlappingRow,
    configured_files,
    require_given_rows,
    settings_of,
    splits_of_files,
    unused_split_notice,
)
from tunewright.data.notices import Conflict, Duplicate, LargeCluster, ReplacedRow, SplitChange
from tunewright.data.options import AddOptions, ColumnMapping
from tunewright.data.readers import (
    Fault,
    ReadResult,
    SourceRow,
    read_pairs,
    require_columns,
    source_digest,
    source_size,
)
from tunewright.data.readers.source_files import hub_source
from tunewright.data.readers.sources import is_workbook, open_source
from tunewright.data.readers.validate import REJECTED, counted, rejected_value
from tunewright.data.screening import screen
from tunewright.data.splits import Split
from tunewright.data.trace import read_metadata
from tunewright.data.versions import DatasetVersion, Manifest, Settings, SourceFile, has_version, locked, save_version
from tunewright.data.versions.logs import KEPT_PAIRS_FILE, KeptPair, add_kept_pairs, append_removals
from tunewright.data.versions.version import cluster_sizes, clusters_by_split, new_manifest


@dataclass(frozen=True)
class AddResult:
    """Result of adding files. ``version`` is current afterwards; ``created`` is true if it is new.

    ``added`` counts new examples, ``known`` rows that the previous version already contained.
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
    overlapping: tuple[OverlappingRow, ...]
    """Rows near a held-out row that is given to another split: left out, moved or kept (data.on_overlap)."""
    largest: tuple[LargeCluster, ...]
    """The largest clusters."""
    outputs: OutputLeakage
    """Test rows whose output, or its template, also occurs in training rows."""
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
    reasoning: int = 0
    """Rows of the files with thinking in a turn."""
    superseded: tuple[str, ...] = ()
    """Places of rows that an earlier ``replace`` superseded and that stay out; not counted as known."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        outputs, version = self.outputs.as_dict(), self.version.model_dump(mode="json")
        return {**asdict(self), "outputs": outputs, "version": version}


def add(
    project: ProjectFolder,
    files: Iterable[str | Path] | None,
    reporter: Reporter,
    options: AddOptions = AddOptions(),
    *,
    message: str = "",
    workers: Workers | None = None,
) -> AddResult:
    """Add files of pairs to the project's dataset; known rows change nothing.

    With ``options.replace`` the output of a known input replaces the one in the dataset, and its split is kept. An
    input with several outputs, in the dataset or in the files, is refused, unless the outputs are the same.

    Args:
        files: files, folders, patterns and datasets of the hub, as ``source_files`` expands them (None: data.sources).
        message: stored with the version.
        workers: check and compare the rows (None: the workers of ``compute.cluster``).

    Raises:
        UserError: faulty rows, secrets (named by place, never by value), new conflicts (unless data.conflicts accepts
            them), an unreadable file, too few rows to split, a dataset changed by hand, a full disk. The dataset is
            then unchanged.
    """
    with prepare_add(project, files, reporter, options, workers) as (project, paths, workers):
        config = project.config
        read = _read(paths, project, reporter, workers, skip_bad=options.skip_bad)
        faults = [fault for _, reading in read for fault in reading.faults]
        rows = [row for _, reading in read for row in reading.rows]
        require_given_rows(paths, rows)
        screened = screen(
            rows,
            config.data.allow,
            reporter,
            redact=options.redact,
            presidio=options.presidio,
            workers=workers,
        )
        if screened.reasoning:
            reporter.say(notices.reasoning_notice(screened.reasoning, config.chat.reasoning))
        with locked(project.dataset):
            plan = plan_add(project, screened.rows, reporter, options, workers=workers)
            version = _save(project, plan, _sources(read, project.root), faults, reporter, message=message)
    merged = plan.merged
    superseded = merged.left_out_as_superseded
    fates = Counter(plan.fate(row)["fate"] for row in merged.rows)
    return AddResult(
        version=version,
        created=plan.created,
        added=fates["added"],
        known=fates["known"] - len(superseded),
        duplicates=merged.duplicates,
        conflicts=merged.conflicts,
        moved=plan.moved,
        skipped=tuple(faults),
        redacted=screened.redacted,
        personal=screened.personal,
        contaminated=plan.hits,
        left_out=len(plan.left_out),
        unaccepted=len(plan.unaccepted),
        overlapping=tuple(plan.overlapping.values()),
        largest=plan.largest,
        outputs=plan.outputs,
        near_duplicates=plan.near,
        replaced=merged.replaced,
        reasoning=screened.reasoning,
        removed=tuple(f"{row.source}:{row.line}" for row in merged.rows if row.example.pair_key in merged.withheld),
        superseded=tuple(f"{row.source}:{row.line}" for row in superseded),
        clusters=clusters_by_split(plan.members),
        dev_clusters=cluster_sizes(plan.members, "dev"),
    )


@contextmanager
def prepare_add(
    project: ProjectFolder,
    files: Iterable[str | Path] | None,
    reporter: Reporter,
    options: AddOptions,
    workers: Workers | None = None,
) -> Iterator[tuple[ProjectFolder, Mapping[Path, Split | None], Workers]]:
    """Yield the project with the options in its config, the files to read with their given splits, and the workers."""
    if files is None and not project.config.data.sources:
        raise UserError(
            "The config lists no sources of pairs",
            where="data.sources",
            fix="List your files, such as sources: [pairs.jsonl]. `data add` and `data check` also take files by name: "
            "tunewright data add FILE",
        )
    paths = splits_of_files(configured_files(project) if files is None else files, project, options.split, reporter)
    data = map_columns(project.config.data, options.mapping, list(paths))
    given = options.split_from or data.split_column or any(paths.values())
    if not given and not has_version(project.dataset) and (notice := unused_split_notice(paths)):
        reporter.say(notice)
    if options.accept_conflicts:
        data = data.model_copy(update={"conflicts": "accept"})
    optioned = ProjectFolder(project.root, project.config.model_copy(update={"data": data}))
    with open_workers(project.config, reporter) if workers is None else nullcontext(workers) as opened:
        yield optioned, paths, opened


def map_columns(data: DataConfig, mapping: ColumnMapping, paths: Sequence[Path]) -> DataConfig:
    """Return the config's data section with a mapping's values; each must be used by a file."""
    given = mapping.given
    if empty := [key for key, option in given.items() if not option]:
        raise UserError(
            "Must not be empty", where=f"--{empty[0].replace('_', '-')}", fix="Omit it to use the config's value."
        )
    data = data.model_copy(update=given)
    if mapping.header_row is not None:
        if not any(open_source(path, data, []).table for path in paths):
            raise UserError("No file is a table", where="--header-row", fix="Leave it out for these files.")
        sources = tuple(each.model_copy(update={"header_row": None}) for each in data.sources)
        data = data.model_copy(update={"sources": sources})
    if mapping.sheet is not None and not any(map(is_workbook, paths)):
        raise UserError("No file is an .xlsx workbook", where="--sheet", fix="Leave it out for these files.")
    if columns := [key for key in given if key in ("input", "output")]:
        require_columns(paths, data, "--" + "/--".join(columns))
    return data


def _save(
    project: ProjectFolder,
    plan: AddPlan,
    sources: Mapping[str, SourceFile],
    faults: Sequence[Fault],
    reporter: Reporter,
    *,
    message: str,
) -> Manifest:
    """Write the planned version, unless it is the current one."""
    merged, config = plan.merged, project.config
    parent = merged.parent
    if not plan.created:
        assert parent is not None
        if message:
            reporter.warn("The message was not stored: nothing is new, so no version was created.")
        _keep_known(project.dataset, plan, parent, sources, reporter)
        return parent.manifest
    if config.data.duplicates == "drop":  # new ones are dropped, so only the parent's remain
        near = parent.manifest.counts.near_duplicates if parent else 0
    else:
        near = sum(m.key in merged.near for m in plan.members)
    accepted = parent is not None and parent.manifest.settings.conflicts == "accept"
    settings = config.data.model_dump(include=Settings.model_fields.keys() - {"seed"})
    if accepted:
        settings["conflicts"] = "accept"
    with reporter.task("counting", len(plan.members), "examples") as task:
        version = new_manifest(
            plan.members,
            parent,
            Settings(**settings, seed=config.seed),
            message=message,
            sources=sources.values(),
            duplicates=len(merged.duplicates),
            skipped=len(faults),
            moved=len(plan.moved),
            mix=plan.mixed.about if plan.mixed else None,
            near_duplicates=near,
            split_from=plan.inherited.about if plan.inherited else None,
            given_split=plan.given_split,
        )
        task.advance(len(plan.members))
    imports = _Imports(plan, faults, sources)
    if kept := Counter(key for line in imports for key in line.get("metadata", ())):
        reporter.say(f"Kept as metadata: {counted(kept)}")
    version = save_version(project.dataset, version, plan.members, imports, reporter)
    append_removals(project.dataset, [removal.restored(project.root) for removal in plan.restored])
    return version


def _keep_known(
    dataset: Path, plan: AddPlan, parent: DatasetVersion, sources: Mapping[str, SourceFile], reporter: Reporter
) -> None:
    """Keep the rejected answers of known rows as preference pairs, and warn of metadata that is not stored."""
    known = read_metadata(dataset, parent.manifest)
    pairs, other = [], 0
    for row in plan.merged.rows:
        fate = plan.fate(row) if row.metadata else {}
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
        new, *others = ({name: each[name] for name in each if name != REJECTED} for each in (row.metadata, *before))
        other += bool(new) and new not in others
    if kept := add_kept_pairs(dataset, pairs):
        reporter.say(f"Kept {count_of(kept, 'preference pair')} of known rows (dataset/{KEPT_PAIRS_FILE})")
    if other:
        reporter.warn(
            f"The metadata of {count_of(other, 'known row')} was not stored: nothing else is new, so no version "
            "was created."
        )


def _read(
    files: Mapping[Path, Split | None], project: ProjectFolder, reporter: Reporter, workers: Workers, *, skip_bad: bool
) -> list[tuple[Path, ReadResult]]:
    if not files:
        raise UserError("No file to add", fix="Name one or more files of pairs, or list them in data.sources.")
    size = sum(source_size(path) for path in files)
    with reporter.task("reading", size, "bytes") as task:
        read = [
            (path, read_pairs(path, settings_of(path, project), task, workers, split)) for path, split in files.items()
        ]
    for note in notices.of_files((path, reading.notes) for path, reading in read):
        reporter.say(note)
    if faults := [fault for _, reading in read for fault in reading.faults]:
        if not skip_bad:
            raise notices.faulty(faults)
        reporter.warn(notices.skipped(faults))
    return read


def _sources(read: Sequence[tuple[Path, ReadResult]], root: Path) -> dict[str, SourceFile]:
    """Map each file's name in messages to its source record, named relative to the project or by its file name."""
    sources: dict[str, SourceFile] = {}
    for path, reading in read:
        full, home = path.resolve(), root.resolve()
        name = full.relative_to(home).as_posix() if full.is_relative_to(home) else hub_source(path) or path.name
        name += reading.source.removeprefix(str(path))  # the sheet of a workbook
        sha256 = source_digest(path)
        if any(other != reading.source and source.name == name for other, source in sources.items()):
            name = f"{name}@{sha256[:8]}"  # two files with the same name, from different folders
        sources[reading.source] = SourceFile(name=name, sha256=sha256, rows=len(reading.rows))
    return sources


@dataclass(frozen=True)
class _Imports:
    """The lines of imports.jsonl: one per row of each file, sorted by file and line.

    They are made on demand: ten million of them would take more memory than the rows.
    """

    plan: AddPlan
    skipped: Sequence[Fault]
    sources: Mapping[str, SourceFile]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        found: dict[str, list[SourceRow | Fault]] = defaultdict(list)
        for items in (self.plan.merged.rows, self.skipped):
            for each in items:
                found[self.sources[each.source].name].append(each)
        fates: dict[int, dict[str, Any]] = {}  # fates of rows drawn for the mix-in
        if mixed := self.plan.mixed:
            fates |= {id(row): {"fate": "mixed", "key": row.example.pair_key} for row in mixed.rows}
            for row, reason in mixed.left_out:
                fates[id(row)] = {"fate": "not mixed", "key": row.example.pair_key, "reason": reason}
            found[mixed.about.source.name] += [*mixed.rows, *(row for row, _ in mixed.left_out)]
        for name in sorted(found):
            for item in sorted(found[name], key=lambda item: item.line):
                yield {"source": name, "line": item.line, **(fates.get(id(item)) or self._fate(item))}

    def _fate(self, item: SourceRow | Fault) -> dict[str, Any]:
        if isinstance(item, Fault):
            return {"fate": "skipped", "code": item.code, "reason": item.reason}
        fate = self.plan.fate(item)
        # Rows that stay out get no metadata: a purge erases metadata by the keys of rows that were in a version.
        if item.metadata and fate["fate"] not in ("removed", "contaminated", "unaccepted", "overlapping"):
            fate["metadata"] = item.metadata
        return fate
