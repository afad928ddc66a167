"""Planning an import without writing: merge, look for contamination, cluster, split and mix in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tunewright.config import Config, Duplicates, metric_name
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of
from tunewright.core.workers import THIS_PROCESS, Workers
from tunewright.data import notices
from tunewright.data.dedup import find_clusters, largest_clusters
from tunewright.data.dedup.decontaminate import (
    TEST,
    ContaminationHit,
    MatchKind,
    find_hits,
    item_names,
    read_items,
    training_hits,
)
from tunewright.data.dedup.output_leakage import OutputLeakage, measure_output_leakage
from tunewright.data.examples import Example, find_labels, template_groups
from tunewright.data.given_split import (
    InheritedSplit,
    OverlappingRow,
    find_overlaps,
    given_notice,
    given_split_of,
    inherit_split,
    overlap_notice,
    refuse_changes,
)
from tunewright.data.merge import Merge, merge
from tunewright.data.mix import DrawnMix, mix_in
from tunewright.data.notices import Conflict, Duplicate, LargeCluster, SplitChange
from tunewright.data.options import AddOptions
from tunewright.data.readers import SourceRow
from tunewright.data.review.edits import unaccepted_keys
from tunewright.data.splits import Split, assign_splits, join_groups
from tunewright.data.versions import DatasetVersion, Member, members_digest
from tunewright.data.versions.logs import Removal, read_removals, removals_ended_by, removed_rows_notice
from tunewright.data.versions.version import GivenSplit, rename_clusters

_LARGEST = 5


@dataclass(frozen=True)
class AddPlan:
    """A planned version with its mix-in, and findings for messages; nothing is written yet."""

    merged: Merge
    members: list[Member]
    moved: tuple[SplitChange, ...]
    near: tuple[Duplicate, ...]
    hits: tuple[ContaminationHit, ...]
    held: list[tuple[str, MatchKind, str]]
    """The hits of rows that stay, for messages: place, kind of match, item."""
    left_out: frozenset[str]
    """Pair keys of training rows that contain a test row or benchmark item."""
    unaccepted: frozenset[str]
    """Pair keys of generated rows that would be held out, and that nobody has accepted."""
    overlapping: Mapping[str, OverlappingRow]
    """Rows near a row that is given to another split, by pair key: left out, moved or kept (data.on_overlap)."""
    given_split: GivenSplit | None
    """The record of the authors' split; None: every row is drawn."""
    mixed: DrawnMix | None
    largest: tuple[LargeCluster, ...]
    outputs: OutputLeakage
    inherited: InheritedSplit | None
    restored: Sequence[Removal]

    @cached_property
    def keys(self) -> frozenset[str]:
        """The pair keys of the planned version."""
        return frozenset(m.key for m in self.members)

    @property
    def created(self) -> bool:
        """True if the planned version differs from the current one."""
        parent = self.merged.parent
        return parent is None or parent.digest != members_digest(self.members)

    def fate(self, row: SourceRow) -> dict[str, Any]:
        """Return the record of imports.jsonl for a row."""
        fate = self.merged.fate(row)
        key = fate.get("of", fate["key"])
        if key in self.unaccepted:
            return {**fate, "fate": "unaccepted"}
        if key in self.overlapping and key not in self.keys:
            return {**fate, "fate": "overlapping", "near": self.overlapping[key].near}
        return {**fate, "fate": "contaminated"} if key in self.left_out else fate


def plan_add(
    project: ProjectFolder,
    rows: Sequence[SourceRow],
    reporter: Reporter,
    options: AddOptions,
    *,
    refuse_conflicts: bool = True,
    workers: Workers = THIS_PROCESS,
) -> AddPlan:
    """Merge screened rows into the current version, cluster and split them, without writing anything.

    New conflicts are refused, unless data.conflicts accepts them; without ``refuse_conflicts`` they are only in the
    plan.
    """
    data = project.config.data
    with reporter.task("merging", len(rows), "examples") as task:
        merged = merge(project.dataset, rows, data, options, reporter, workers)
        task.advance(len(rows))
    accepted = data.conflicts == "accept"
    if refuse_conflicts and not accepted and merged.fresh_conflicts:
        raise merged.refusal
    if data.duplicates == "keep":
        merged.compare(data.dedup_threshold, reporter, workers)
    _report_merge(merged, data.duplicates, options, reporter)
    inherited = inherit_split(options.split_from, merged, data.split_by) if options.split_from is not None else None
    refuse_changes(project, merged, {**inherited.splits, **inherited.given} if inherited else {})
    plan = _plan_version(project, merged, inherited, reporter, workers)
    if inherited:
        reporter.say(inherited.notice(plan.members))
    if plan.given_split and plan.created:
        reporter.say(given_notice(plan.members, plan.given_split))
    if plan.overlapping and (plan.created or data.on_overlap == "drop-train"):
        reporter.warn(overlap_notice(plan.overlapping.values(), data.on_overlap))
    if plan.near:
        reporter.say(notices.near_duplicates(plan.near))
    if options.restore and not plan.restored and not merged.superseded:
        reporter.say("Nothing to restore: no row of these files was removed earlier.")
    if superseded := merged.left_out_as_superseded:
        reporter.say(notices.superseded(superseded))
    if plan.created:
        _warn(plan, merged.fresh_conflicts if accepted else [], reporter)
        notices.warn_of_one_answer(
            [m for m in plan.members if not m.mixed], metric_name(project.config.evaluate.metric), reporter
        )
    return plan


def _plan_version(
    project: ProjectFolder, merged: Merge, inherited: InheritedSplit | None, reporter: Reporter, workers: Workers
) -> AddPlan:
    """Cluster and split the rows, look for contamination, and draw the mix-in."""
    config = project.config
    benchmarks = {name: read_items(project.root / name) for name in config.data.benchmarks}
    dropping = config.data.contaminated == "drop"
    training = _to_train(merged, benchmarks, reporter, workers) if dropping else frozenset()
    manifest = merged.parent.manifest if merged.parent else None
    doubtful = unaccepted_keys(project.dataset, manifest, merged.generated)
    _refuse_generated_replacements(merged, doubtful)
    domain, unaccepted, overlapping = _domain(merged, config, training, reporter, inherited, doubtful, workers)
    # Shared phrases ("overlap") are reported by `data leakage` only.
    hits = tuple(hit for hit in training_hits(domain, benchmarks, reporter, workers) if hit.how != "overlap")
    items = item_names(hits, domain)
    held = [(merged.place(hit.row), hit.how, item) for hit, item in zip(hits, items, strict=True)]
    left_out = frozenset(hit.row for hit in hits if dropping or hit.row in doubtful)
    if left_out:
        gone = [each for each, hit in zip(held, hits, strict=True) if hit.row in left_out]
        held = [each for each, hit in zip(held, hits, strict=True) if hit.row not in left_out]
        reporter.warn(notices.contaminated(gone, dropping=True))
        notices.warn_of_lost_classes(domain, left_out, reporter)
        domain = rename_clusters([m for m in domain if m.key not in left_out])
    former = merged.former
    moved = tuple(SplitChange(m.key, former[m.key], m.split) for m in domain if former.get(m.key, m.split) != m.split)
    mix = config.data.mix
    removed = read_removals(project.dataset).out
    mixed = mix_in(project.root, config, mix, domain, benchmarks, reporter, removed) if mix else None
    members = sorted([*domain, *(mixed.members if mixed else [])], key=lambda m: m.key)
    with reporter.task("measuring clusters and outputs", len(domain), "examples") as task:
        families = largest_clusters([m.example for m in domain], [m.cluster for m in domain], _LARGEST)
        ends = [[domain[end].example.input_text for end in f.ends] for f in families]
        largest = tuple(
            LargeCluster(f.rows, one, other, f.similarity) for f, (one, other) in zip(families, ends, strict=True)
        )
        outputs = measure_output_leakage(domain)
        task.advance(len(domain))
    return AddPlan(
        merged=merged,
        members=members,
        moved=moved,
        near=merged.near_duplicates({m.key for m in members}),
        hits=hits,
        held=held,
        left_out=left_out,
        unaccepted=unaccepted,
        overlapping=overlapping,
        given_split=given_split_of(domain, merged, config.data, inherited),
        mixed=mixed,
        largest=largest,
        outputs=outputs,
        inherited=inherited,
        restored=removals_ended_by(project.dataset, [row for key, row in merged.first.items() if key in merged.kept]),
    )


def _refuse_generated_replacements(merged: Merge, doubtful: Collection[str]) -> None:
    """Refuse generated rows that would replace held-out ones: the version would lose a measured row of a person."""
    splits = {m.key: m.split for m in merged.parent.domain} if merged.parent else {}
    rows = [
        merged.replacement.rows[new]
        for new, olds in merged.replacement.olds.items()
        if new in doubtful and any(splits.get(old, "train") != "train" for old in olds)
    ]
    if rows:
        raise UserError(
            f"Nothing was replaced: {count_of(len(rows), 'generated row')} would replace rows of dev or test",
            where=f"{rows[0].source}:{rows[0].line}",
            fix="Delete these rows from the file, or correct the answers in `tunewright data review`.",
        )


def _to_train(
    merged: Merge, benchmarks: Mapping[str, Sequence[str]], reporter: Reporter, workers: Workers
) -> frozenset[str]:
    """Return the new rows that contain a known test input or a benchmark item.

    Such a row must not go to dev or test: a row left out earlier would return when its file is added again.
    """
    new = {key: merged.kept[key] for key in merged.first if key in merged.kept}
    tests = [m.example.input_text for m in merged.parent.domain_of("test")] if merged.parent else []
    labels = find_labels(example.output for example in merged.kept.values())
    hits = find_hits(new, {TEST: tests, **benchmarks}, reporter, labels, workers)
    return frozenset(hit.row for hit in hits if hit.how != "overlap")


def _domain(
    merged: Merge,
    config: Config,
    training: Collection[str],
    reporter: Reporter,
    inherited: InheritedSplit | None,
    doubtful: Collection[str],
    workers: Workers,
) -> tuple[list[Member], frozenset[str], dict[str, OverlappingRow]]:
    """Return the domain rows with splits and clusters, joined where rows share a group or an output template.

    Rows of ``training`` are trained on, unless their cluster is held out already. Rows of ``doubtful`` (generated,
    and accepted by nobody) are only trained on: such rows of a held-out cluster are left out, and returned by key.
    So are rows in the cluster of a row that authors gave to another split, by data.on_overlap.
    """
    given = {**(inherited.given if inherited else {}), **merged.given}
    former: dict[str, Split] = {**dict.fromkeys(set(training) - given.keys(), "train"), **merged.former}
    if inherited:  # only the first version of a dataset inherits a split: it has no former rows
        former |= inherited.splits
    side = given | former
    overlapping: dict[str, OverlappingRow] = {}
    groups = merged.groups
    keys = sorted(merged.kept)
    unaccepted: frozenset[str] = frozenset()
    while True:
        similar = _similar(keys, merged, config, reporter, workers)
        clusters = _joined(similar, groups, merged.kept, config)
        # Only the row that resembles a held-out one leaves; other rows of its document or group may stay.
        gone = _held_out(similar, side, doubtful) or _held_out(clusters, side, doubtful)
        unaccepted |= gone
        if not gone and given:
            dropping = config.data.on_overlap == "drop-train"
            found = find_overlaps(similar, side, given, merged) if dropping else {}
            found = found or find_overlaps(clusters, side, given, merged)
            overlapping |= found
            gone = frozenset(found) if dropping else frozenset()
        if not gone:
            break
        # Similarity ignores the words that all inputs share. Without these rows they may change: compare again.
        keys = [key for key in keys if key not in gone]
    if unaccepted:
        reporter.warn(notices.unaccepted([merged.place(key) for key in sorted(unaccepted)]))
    read = {merged.kept_pair_key(row.example.pair_key) for row in merged.rows}
    notices.warn_of_missing_groups(config.data.group_by, merged.parent, groups, read, reporter)
    notices.warn_of_idle_groups(config.data.group_by, groups, reporter)
    if merged.parent is not None:
        _refuse_another_split(merged.parent, clusters, merged.former, config)
    with reporter.task("splitting", len(keys), "examples") as task:
        cluster_of = {key: name for name, members in clusters.items() for key in members}
        labels = {label: label for label in find_labels(merged.kept[key].output for key in keys)}
        class_of = {key: labels[merged.kept[key].output.strip()] for key in keys} if labels else None
        train_only = frozenset(doubtful).intersection(keys)
        given = {key: split for key, split in given.items() if key in cluster_of}
        splits = assign_splits(clusters, former, config.data, config.seed, class_of, train_only, given)
        keep = overlapping if config.data.on_overlap == "keep" else {}
        members = [
            Member(
                merged.kept[key],
                key,
                (keep[key].split or "train") if key in keep else splits[cluster_of[key]],
                cluster_of[key],
                groups.get(key, ()),
                generated=key in merged.generated,
                given=given.get(key),
            )
            for key in keys
        ]
        task.advance(len(keys))
    return members, unaccepted, overlapping


def _held_out(
    clusters: Mapping[str, Sequence[str]], former: Mapping[str, Split], doubtful: Collection[str]
) -> frozenset[str]:
    """Return the doubtful rows of clusters that have a held-out row."""
    held_out = (keys for keys in clusters.values() if {former.get(key) for key in keys} & {"dev", "test"})
    return frozenset(key for keys in held_out for key in keys if key in doubtful)


def _similar(
    keys: Sequence[str], merged: Merge, config: Config, reporter: Reporter, workers: Workers
) -> dict[str, list[str]]:
    """Return the keys of each cluster of similar inputs."""
    clusters: dict[str, list[str]] = defaultdict(list)
    if merged.similar is not None and len(keys) == len(merged.kept):
        name_of = dict(zip(merged.kept, merged.similar, strict=True))
    else:
        names = find_clusters([merged.kept[key] for key in keys], config.data.dedup_threshold, reporter, workers)
        name_of = dict(zip(keys, names, strict=True))
    for key in keys:
        clusters[name_of[key]].append(key)
    return clusters


def _joined(
    clusters: Mapping[str, Sequence[str]],
    groups: Mapping[str, tuple[str, ...]],
    rows: Mapping[str, Example],
    config: Config,
) -> Mapping[str, Sequence[str]]:
    """Return the clusters, joined where rows share a group or an output template."""
    if config.data.split_by != "output_template":
        return join_groups(clusters, groups) if groups else clusters
    keys = [key for members in clusters.values() for key in members]
    by_template = template_groups({key: rows[key].output.strip() for key in keys})
    together = {key: (*groups.get(key, ()), *([by_template[key]] if key in by_template else ())) for key in keys}
    return join_groups(clusters, together)


def _refuse_another_split(
    parent: DatasetVersion, clusters: Mapping[str, Sequence[str]], former: Mapping[str, Split], config: Config
) -> None:
    """Refuse to split by template if the dataset was split by input and templates are in several splits.

    All rows of such a template would follow one of them into the test split, and most training rows with them.
    """
    if parent.manifest.settings.split_by == config.data.split_by or config.data.split_by == "input":
        return
    torn = [keys for keys in clusters.values() if len({former[key] for key in keys if key in former}) > 1]
    if torn:
        raise UserError(
            f"The dataset was split by input, and {sum(map(len, torn)):,} of its {len(former):,} rows have output "
            "templates in several splits",
            where="data.split_by",
            fix="Set data.split_by: input, or start a new dataset: move the dataset folder away and add the files "
            "again without --split-from.",
        )


def _report_merge(merged: Merge, setting: Duplicates, options: AddOptions, reporter: Reporter) -> None:
    """Report rows that repeat or replace other rows, stay out, or have other weights."""
    if merged.duplicates:
        reporter.warn(notices.duplicates(merged.duplicates, setting))
    if merged.withheld:
        reporter.warn(removed_rows_notice(merged.rows, merged.withheld))
    if options.replace and not merged.replacement.olds:
        reporter.say("Nothing to replace: no input in these files has another output in the dataset.")
    if merged.replacement.edits_kept:
        reporter.warn(notices.kept_edits(merged.replacement.edits_kept))
    if merged.replacement.olds:
        reporter.say(notices.replaced(merged.replaced))
        tested = sum(merged.former.get(key) == "test" for key in merged.replacement.olds)
        if tested:
            reporter.warn(f"{tested:,} test rows were replaced: scores of the two versions are not comparable.")
    if merged.reweighted:
        reporter.warn(notices.reweighted([merged.kept[key] for key in merged.reweighted]))


def _warn(plan: AddPlan, accepted: Sequence[Conflict], reporter: Reporter) -> None:
    merged, parent = plan.merged, plan.merged.parent
    notices.warn_of_another_system_turn(
        [m.example for m in parent.domain] if parent else [],
        [merged.kept[key] for key in merged.first if key in merged.kept],
        reporter,
    )
    domain = [m for m in plan.members if not m.mixed]
    notices.warn_of_contents(domain, accepted, plan.moved, plan.largest, reporter)
    if plan.largest:
        reporter.say(notices.largest(plan.largest))
    if plan.held:
        reporter.warn(notices.contaminated(plan.held, dropping=False))
    notices.warn_of_untrained_answers(domain, reporter)
    if plan.outputs.high:
        reporter.warn(notices.known_outputs(plan.outputs))
    if plan.mixed:
        about, wanted, left_out = plan.mixed.about, plan.mixed.wanted, plan.mixed.left_out
        if about.drawn < wanted:
            reporter.warn(
                f"{about.source.name} has only {about.drawn:,} usable rows to mix in (data.mix asks for {wanted:,})."
            )
        if left_out:
            reporter.warn(notices.not_mixed([(f"{row.source}:{row.line}", reason) for row, reason in left_out]))
        reporter.say(f"Mixed in: {about.drawn:,} of {about.source.rows:,} rows of {about.source.name} (training only)")
