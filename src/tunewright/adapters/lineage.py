"""What an adapter was made of, followed to the rows: its lineage held against the dataset versions that are here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.adapters.registry import Adapter
from tunewright.adapters.system_prompt import SystemPrompt, system_prompt
from tunewright.core.errors import UserError
from tunewright.data.splits import SPLITS, Split
from tunewright.data.versions import keys_digest, list_versions, load_version
from tunewright.data.versions.members import Places, read_places


@dataclass(frozen=True)
class SplitTrace:
    """One split of the dataset version that an adapter was trained on."""

    split: Split
    digest: str
    rows: int
    left_out: tuple[str, ...]
    """Pair keys of rows that were too long, which the config had training leave out."""
    keys: tuple[str, ...] | None
    """The pair keys of all its rows, sorted; None where the version is not here, or has other rows in this split."""


@dataclass(frozen=True)
class DatasetTrace:
    """The dataset version that an adapter was trained on."""

    digest: str
    found: bool
    """Whether it is here, and its rows are those that the lineage names by digest."""
    why_not: str
    splits: tuple[SplitTrace, ...]
    mix: Mapping[str, Any] | None
    """The generic mix-in among the training rows, as the version's manifest has it."""


@dataclass(frozen=True)
class Trace:
    """An adapter and all that it was made of; a foreign adapter has no config and no dataset."""

    name: str
    digest: str
    created: str
    base: Mapping[str, Any]
    template: str
    config: Mapping[str, Any] | None
    seed: int | None
    dataset: DatasetTrace | None
    system_prompt: SystemPrompt
    """The one that it was trained with."""
    replayed: int
    """Conversations that the base wrote and the adapter was trained on besides."""
    training: Mapping[str, Any] | None
    scaled: Mapping[str, Any] | None
    """Of which adapter it is a part, and how large a one."""
    stated: Mapping[str, Any] | None
    """What whoever imported it says of it, where nothing else does."""
    imported: Mapping[str, Any] | None
    packages: Mapping[str, str]

    def as_dict(self, *, rows: bool) -> dict[str, Any]:
        """Return the trace as ``--json`` prints it, with the rows' keys or without."""
        document = asdict(self)
        for split in document["dataset"]["splits"] if document["dataset"] and not rows else ():
            del split["keys"]
        return document


def trace(adapter: Adapter, dataset: Path) -> Trace:
    """Follow an adapter's lineage.

    Args:
        adapter: a stored one.
        dataset: the project's dataset folder.
    """
    lineage = adapter.lineage
    return Trace(
        name=adapter.name,
        digest=adapter.digest,
        created=lineage["created"],
        base=lineage["base"],
        template=lineage["template_digest"],
        config=lineage.get("config"),
        seed=lineage.get("seed"),
        dataset=_dataset(lineage, dataset) if "dataset" in lineage else None,
        system_prompt=system_prompt(adapter, dataset),
        replayed=len(adapter.replayed),
        training=lineage.get("training"),
        scaled=lineage.get("scaled"),
        stated=lineage.get("stated"),
        imported=adapter.imported,
        packages=lineage.get("packages", {}),
    )


def _dataset(lineage: Mapping[str, Any], dataset: Path) -> DatasetTrace:
    named = lineage["dataset"]
    places, why_not = _find(dataset, named["digest"])
    left_out = {
        name: tuple(row["key"] for row in told["left_out"]) for name, told in lineage.get("rendering", {}).items()
    }
    splits = []
    for split in SPLITS:
        told = named["splits"][split]
        there = sorted(key for key, place in places.items() if place.split == split) if places is not None else []
        same = places is not None and keys_digest(there) == told["digest"]
        if places is not None and not same:
            why_not = f"its {split} split has other rows than the lineage says"
        keys = tuple(there) if same else None
        splits.append(SplitTrace(split, told["digest"], told["examples"], left_out.get(split, ()), keys))
    return DatasetTrace(named["digest"], not why_not, why_not, tuple(splits), named.get("mix"))


def _find(dataset: Path, digest: str) -> tuple[Places | None, str]:
    """Return the places of the rows of the version with that digest, purged ones included, or why there is none."""
    if digest not in {manifest.digest for manifest in list_versions(dataset)}:
        return None, "it is not here"
    try:
        load_version(dataset, digest, without_purged=True)
        return read_places(dataset, digest), ""
    except UserError as error:
        return None, error.what
