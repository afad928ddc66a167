"""An adapter's lineage: written after training, and traced to the rows of the dataset versions at hand."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version as package_version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.adapters.registry import Adapter
from tunewright.adapters.system_prompt import KEY as SYSTEM_PROMPT_KEY
from tunewright.adapters.system_prompt import SystemPrompt, count_system_turns, system_prompt
from tunewright.config import Config, Quantization
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.data.splits import SPLITS, Split
from tunewright.data.trace import ancestors, trained_keys
from tunewright.data.versions import DatasetVersion, keys_digest, list_versions, load_version
from tunewright.data.versions.members import Places, read_places

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat
    from tunewright.models.bases import Base


@dataclass(frozen=True)
class SplitTrace:
    """One split of the dataset version that an adapter was trained on."""

    split: Split
    digest: str
    rows: int
    left_out: tuple[str, ...]
    """Pair keys of rows that training did not use: too long, without a pair, or generated (train.generated: false)."""
    keys: tuple[str, ...] | None
    """Sorted pair keys of all its rows; None if the version is missing, or has other rows in this split."""


@dataclass(frozen=True)
class DatasetTrace:
    """The dataset version that an adapter was trained on."""

    digest: str
    found: bool
    """True if it exists here, with the rows that the lineage names by digest."""
    why_not: str
    splits: tuple[SplitTrace, ...]
    mix: Mapping[str, Any] | None
    """The generic mix-in among the training rows, from the version's manifest."""


@dataclass(frozen=True)
class Trace:
    """An adapter and all of its inputs; a foreign adapter has no config and no dataset."""

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
    """Conversations written by the base that it was also trained on."""
    parents: tuple[Mapping[str, Any], ...]
    """Name, digest and dataset version of the adapter that it started from, then of that one's own, and so on."""
    preferences: Mapping[str, Any] | None
    """The preference data that it was tuned on, without the rows' keys."""
    training: Mapping[str, Any] | None
    stated: Mapping[str, Any] | None
    """The importing user's statement, if nothing else says so."""
    imported: Mapping[str, Any] | None
    packages: Mapping[str, str]

    def as_dict(self, *, rows: bool) -> dict[str, Any]:
        """Return the trace for ``--json``, with or without the rows' keys."""
        document = asdict(self)
        for split in document["dataset"]["splits"] if document["dataset"] and not rows else ():
            del split["keys"]
        return document


def trace(adapter: Adapter, dataset: Path) -> Trace:
    """Trace an adapter's lineage.

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
        parents=tuple(
            {"name": each["name"], "digest": each["digest"], "dataset": each["dataset"]["digest"]}
            for each in islice(ancestors(lineage), 1, None)
        ),
        preferences={key: value for key, value in lineage["preferences"].items() if key != "rows"}
        if "preferences" in lineage
        else None,
        training=lineage.get("training"),
        stated=lineage.get("stated"),
        imported=adapter.imported,
        packages=lineage.get("packages", {}),
    )


def _dataset(lineage: Mapping[str, Any], dataset: Path) -> DatasetTrace:
    named = lineage["dataset"]
    places, why_not = _find(dataset, named["digest"])
    left_out = {
        name: tuple(row["key"] for row in seen["left_out"]) for name, seen in lineage.get("rendering", {}).items()
    }
    splits = []
    for split in SPLITS:
        recorded = named["splits"][split]
        here = sorted(key for key, place in places.items() if place.split == split) if places is not None else []
        same = places is not None and keys_digest(here) == recorded["digest"]
        if places is not None and not same:
            why_not = f"its {split} split has other rows than the lineage records"
        keys = tuple(here) if same else None
        if keys is not None and split == "train" and "rendering" in lineage:
            used = trained_keys(dataset, lineage)
            left_out[split] = tuple(key for key in keys if key not in used)
        splits.append(SplitTrace(split, recorded["digest"], recorded["examples"], left_out.get(split, ()), keys))
    return DatasetTrace(named["digest"], not why_not, why_not, tuple(splits), named.get("mix"))


def _find(dataset: Path, digest: str) -> tuple[Places | None, str]:
    """Return the rows' splits in the version with that digest, including purged rows, or the reason why it is
    unavailable.
    """
    if digest not in {manifest.digest for manifest in list_versions(dataset)}:
        return None, "it is missing"
    try:
        load_version(dataset, digest, without_purged=True)
        return read_places(dataset, digest), ""
    except UserError as error:
        return None, error.what


_PACKAGES = ("tunewright", "torch", "transformers", "peft", "trl", "accelerate", "tokenizers", "safetensors")


def packages(quantization: Quantization) -> dict[str, str]:
    """Return the versions of Python and of the packages that affect numbers, for a base quantized so."""
    names = (*_PACKAGES, "bitsandbytes") if quantization == "nf4" else _PACKAGES
    return {"python": platform.python_version(), **{name: package_version(name) for name in names}}


def training_lineage(config: Config, version: DatasetVersion, base: Base, chat: ChatFormat) -> dict[str, Any]:
    """Return the lineage without the training's results; ``created`` is UTC, ISO 8601."""
    return {
        "schema_version": 2,
        "created": now(),
        "dataset": {
            "digest": version.digest,
            "splits": {s: {"digest": version.split_digest(s), "examples": len(version.examples(s))} for s in SPLITS},
            "mix": version.manifest.mix.model_dump(mode="json") if version.manifest.mix else None,
        },
        SYSTEM_PROMPT_KEY: count_system_turns(version.domain_of("train")),
        "base": {"spec": base.spec, "commit": base.commit, "digest": base.digest, "files": base.files},
        "template_digest": chat.digest,
        "chat": chat.description,
        "config": config.deciding(),
        "seed": config.seed,
        "packages": packages(config.train.quantization),
    }
