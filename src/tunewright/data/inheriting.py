"""The split of another dataset, for the rows that a new one shares with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.data.examples import Example
from tunewright.data.outputs import template_groups
from tunewright.data.splits import SPLITS, Split
from tunewright.data.versions import DatasetVersion, Member, load_version, short
from tunewright.data.versions.manifest import SplitFrom


@dataclass(frozen=True)
class Inherited:
    """The version that the split comes from, and the split that each row of the new dataset had there."""

    version: DatasetVersion
    name: str
    splits: dict[str, Split]

    @property
    def about(self) -> SplitFrom:
        """What the manifest says of it."""
        return SplitFrom(name=self.name, digest=self.version.digest, rows=len(self.splits))


def inherit(path: Path, parent: DatasetVersion | None, rows: Mapping[str, Example]) -> Inherited:
    """Find the split that rows had in another dataset's current version.

    A row has the split of the pair there, else of the row with its question: the prompt without system turns, case and
    white space set aside. Rows whose question has several splits there get the one that is held out further.

    Args:
        path: a project's folder, or its dataset folder.
        parent: the version that is current here, which there must not be.
        rows: the rows of the new dataset by pair key.

    Raises:
        UserError: there is a version here already, none there, or no row is shared.
    """
    where = f"--split-from {path}"
    if parent is not None:
        raise UserError(
            f"this dataset has a split of its own, that of version {short(parent.digest)}",
            where=where,
            fix="Start a new project: only a dataset's first version can inherit a split.",
        )
    dataset = path / "dataset" if (path / "dataset").is_dir() else path
    if not (dataset / "versions").is_dir():
        raise UserError("no dataset there", where=where, fix="Name a project's folder, or its dataset folder.")
    version = load_version(dataset)
    by_key: dict[str, Split] = {m.key: m.split for m in version.domain}
    by_question: dict[str, Split] = {}
    for split in SPLITS:  # test comes last and stays
        by_question |= {m.example.question: split for m in version.domain_of(split)}
    found = {key: by_key.get(key) or by_question.get(example.question) for key, example in rows.items()}
    splits = {key: split for key, split in found.items() if split is not None}
    if not splits:
        raise UserError(
            f"no row of version {short(version.digest)} there has a pair or an input of these files", where=where
        )
    return Inherited(version, dataset.resolve().parent.name, splits)


def refuse_torn_templates(inherited: Inherited, rows: Mapping[str, Example]) -> None:
    """Refuse the split of a dataset that was split by input, if it has output templates on both sides.

    All rows of such a template would follow one of them into the test, most of the training rows among them.

    Args:
        inherited: the split.
        rows: the rows of the new dataset by pair key.

    Raises:
        UserError: rows of one template have several splits.
    """
    if inherited.version.manifest.settings.split_by == "output_template":
        return
    of_template: dict[str, list[Split]] = {}
    for key, template in template_groups({key: rows[key].output for key in inherited.splits}).items():
        of_template.setdefault(template, []).append(inherited.splits[key])
    torn = sum(len(splits) for splits in of_template.values() if len(set(splits)) > 1)
    if torn:
        raise UserError(
            f"{inherited.name} was split by input, and {torn:,} of its {len(inherited.splits):,} rows here have output "
            "templates on both sides",
            where="--split-from",
            fix="Leave it out: a new dataset is split by template from the start. Or set data.split_by: input.",
        )


def told(inherited: Inherited, members: Iterable[Member]) -> str:
    """Return what became of the inherited split, in words."""
    now = {m.key: m.split for m in members if not m.mixed}
    counts = ", ".join(f"{sum(now.get(key) == split for key in inherited.splits):,} {split}" for split in SPLITS)
    moved = sum(now.get(key, split) != split for key, split in inherited.splits.items())
    text = (
        f"Split from {inherited.name}, version {short(inherited.version.digest)}: {len(inherited.splits):,} of "
        f"{len(now):,} rows are there too ({counts} now)"
    )
    if moved:
        text += f"; {moved:,} of them changed sides, because they share a cluster with a row that is held out further"
    return text
