"""What a new version would hold: clusters, splits, no training row with what is measured on, the mix-in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunewright.config import Config
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data import notices
from tunewright.data.dedup import find_clusters, largest_clusters
from tunewright.data.dedup.decontaminate import TEST, Hit, How, contaminated, item_names, read_items, training_hits
from tunewright.data.dedup.output_leakage import OutputLeak, output_leak
from tunewright.data.merge import Merge
from tunewright.data.mix import Mixed, mix_in
from tunewright.data.notices import Largest, Move
from tunewright.data.outputs import labels_among, template_groups
from tunewright.data.readers import SourceRow
from tunewright.data.review.suspects import class_like
from tunewright.data.splits import Split, assign_splits, join_groups
from tunewright.data.versions import DatasetVersion, Member
from tunewright.data.versions.making import renamed
from tunewright.data.versions.removals import read_removals

_LARGEST = 5


@dataclass(frozen=True)
class VersionBuilder:
    """What a new version would hold, mix-in included, and what was found on the way."""

    members: list[Member]
    moved: tuple[Move, ...]
    hits: tuple[Hit, ...]
    held: list[tuple[str, How, str]]  # the hits as people read them
    left_out: frozenset[str]  # pair keys of training rows that hold an item of a test or benchmark
    mixed: Mixed | None
    largest: tuple[Largest, ...]
    outputs: OutputLeak

    def fate(self, row: SourceRow, merged: Merge) -> dict[str, Any]:
        """Return what became of a row that was read."""
        fate = merged.fate(row)
        return {**fate, "fate": "contaminated"} if fate.get("of", fate["key"]) in self.left_out else fate


def contents(
    project: ProjectFolder,
    merged: Merge,
    rows: Sequence[SourceRow],
    reporter: Reporter,
    inherited: Mapping[str, Split] | None = None,
) -> VersionBuilder:
    """Cluster, split, search and mix.

    Args:
        merged: the rows that the version keeps.
        rows: those that were read, with their groups.
        inherited: the split that rows of a new dataset had in another one.

    Raises:
        UserError: too few rows to split, or a file of benchmark items or the mix-in that cannot be used.
    """
    config = project.config
    benchmarks = {name: read_items(project.root / name) for name in config.data.benchmarks}
    dropping = config.data.contaminated == "drop"
    training = _to_train(merged, benchmarks, reporter) if dropping else frozenset()
    domain = _domain(merged, rows, config, training, reporter, inherited or {})
    # Phrases that rows share with an item are left to `data leakage`.
    hits = tuple(hit for hit in training_hits(domain, benchmarks, reporter) if hit.how != "overlap")
    items = item_names(hits, domain)
    held = [(merged.place(hit.row), hit.how, item) for hit, item in zip(hits, items, strict=True)]
    left_out: frozenset[str] = frozenset()
    if hits and dropping:
        reporter.warn(notices.contaminated(held, dropping=True))
        left_out = frozenset(hit.row for hit in hits)
        notices.warn_of_lost_classes(domain, left_out, reporter)
        domain = renamed([m for m in domain if m.key not in left_out])
    former = merged.former
    moved = tuple(Move(m.key, former[m.key], m.split) for m in domain if former.get(m.key, m.split) != m.split)
    mix = config.data.mix
    removed = read_removals(project.dataset).out
    mixed = mix_in(project.root, config, mix, domain, benchmarks, reporter, removed) if mix else None
    families = largest_clusters([m.example for m in domain], [m.cluster for m in domain], _LARGEST)
    largest = tuple(
        Largest(f.rows, domain[f.ends[0]].example.input_text, domain[f.ends[1]].example.input_text, f.similarity)
        for f in families
    )
    members = sorted([*domain, *(mixed.members if mixed else [])], key=lambda m: m.key)
    return VersionBuilder(members, moved, hits, held, left_out, mixed, largest, output_leak(domain))


def _to_train(merged: Merge, benchmarks: Mapping[str, Sequence[str]], reporter: Reporter) -> frozenset[str]:
    """New rows that hold a known test input or a benchmark item.

    Dealt out to dev or test, a row that was left out before would come back with the next adding of its file.
    """
    new = {key: merged.kept[key] for key in merged.first if key in merged.kept}
    tests = [m.example.input_text for m in merged.parent.domain_of("test")] if merged.parent else []
    labels = labels_among([example.output for example in merged.kept.values()])
    hits = contaminated(new, {TEST: tests, **benchmarks}, reporter, labels)
    return frozenset(hit.row for hit in hits if hit.how != "overlap")


def _domain(
    merged: Merge,
    rows: Sequence[SourceRow],
    config: Config,
    training: Collection[str],
    reporter: Reporter,
    inherited: Mapping[str, Split],
) -> list[Member]:
    """Return the rows of the domain with clusters, joined where they share a group (or an output template), and splits.

    Rows of ``training`` are not dealt out: they are for training, unless their cluster is held out already.
    """
    keys = sorted(merged.kept)
    names = find_clusters([merged.kept[key] for key in keys], config.data.dedup_threshold, reporter)
    clusters: dict[str, list[str]] = defaultdict(list)
    for key, name in zip(keys, names, strict=True):
        clusters[name].append(key)
    groups = merged.groups(rows)
    read = {merged.stands_for(row.example.pair_key) for row in rows}
    notices.warn_of_missing_groups(config.data.group_by, merged.parent, groups, read, reporter)
    notices.warn_of_idle_groups(config.data.group_by, groups, reporter)
    outputs = {key: merged.kept[key].output.strip() for key in keys}
    by_template = template_groups(outputs) if config.data.split_by == "output_template" else {}
    together = {key: (*groups.get(key, ()), *([by_template[key]] if key in by_template else ())) for key in keys}
    clusters = join_groups(clusters, together)
    cluster_of = {key: name for name, members in clusters.items() for key in members}
    class_of = outputs if class_like(list(outputs.values())) else None
    former: dict[str, Split] = {**dict.fromkeys(training, "train"), **inherited, **merged.former}
    if merged.parent is not None:
        _refuse_another_split(merged.parent, clusters, merged.former, config)
    splits = assign_splits(clusters, former, config.data, config.seed, class_of)
    return [
        Member(merged.kept[key], key, splits[cluster_of[key]], cluster_of[key], groups.get(key, ())) for key in keys
    ]


def _refuse_another_split(
    parent: DatasetVersion, clusters: Mapping[str, Sequence[str]], former: Mapping[str, Split], config: Config
) -> None:
    """Refuse to split by templates what was split by inputs, where templates lie on both sides.

    All rows of such a template would follow one of them into the test, most of the training rows among them.
    """
    if parent.manifest.settings.split_by == config.data.split_by or config.data.split_by == "input":
        return
    torn = [keys for keys in clusters.values() if len({former[key] for key in keys if key in former}) > 1]
    if torn:
        raise UserError(
            f"the dataset was split by input, and {sum(map(len, torn)):,} of its {len(former):,} rows have output "
            "templates on both sides",
            where="data.split_by",
            fix="Start a new dataset: move the dataset folder away and add the files again. --split-from cannot keep "
            "this split, because it has those templates on both sides. Or set data.split_by: input.",
        )
