"""An adapter's lineage: written after training, and traced to the rows of the dataset versions at hand."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version as package_version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.adapters.registry import Adapter
from tunewright.config import Config, Quantization
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.text import mark_fault, normalize
from tunewright.data.splits import SPLITS, Split
from tunewright.data.trace import ancestors, trained_keys
from tunewright.data.versions import DatasetVersion, Member, keys_digest, list_versions, load_version
from tunewright.data.versions.files import Places, read_places

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat
    from tunewright.models.bases import Base


KEY = "system_prompt"
"""The lineage's key."""

_SHOWN_CHARACTERS = 80
_IMPORTED = (
    "the adapter was imported without a lineage, so its system prompt is unknown "
    "(state it with `tunewright adapters import --system-prompt`)"
)


@dataclass(frozen=True)
class SystemPrompt:
    """The prompt that is added to requests without a system message."""

    text: str | None
    """None: nothing is added."""
    why_none: str | None = None
    """The reason why the prompt is unknown or unused; None if the training rows have no system turn."""

    @property
    def shown(self) -> str:
        """The prompt or the reason on one line."""
        if self.text is None:
            return f"none: {self.why_none}" if self.why_none else "none: no training row has a system turn"
        line = " ".join(self.text.split())
        return f'"{line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"}"'

    def report(self, name: str, reporter: Reporter) -> None:
        """Report the system prompt that a server adds to requests for ``name``, if any."""
        if self.text is not None:
            reporter.say(f"{name}: requests without a system message get the trained system prompt: {self.shown}")
        elif self.why_none is not None:
            reporter.warn(f"{name}: no system prompt is added: {self.why_none}")


def count_system_turns(members: Sequence[Member]) -> dict[str, Any]:
    """Return the lineage's record of the system turns of the domain's training rows.

    It has ``text``, the turn that all rows share (None if there is no such turn); the number of ``rows``;
    how many are ``without`` a system turn; and how many ``distinct`` system turns the other rows have.
    """
    turns = Counter(next((m.content for m in member.example.prompt if m.role == "system"), None) for member in members)
    without = turns.pop(None, 0)
    shared = next(iter(turns)) if len(turns) == 1 and not without else None
    return {"text": shared, "rows": len(members), "without": without, "distinct": len(turns)}


def stated_system_prompt(text: str) -> dict[str, Any]:
    """Return the lineage's record of the system prompt that the user states for a foreign adapter."""
    if not text.strip():
        raise UserError("The system prompt is empty", where="--system-prompt", fix="Remove the option.")
    if fault := mark_fault(text):
        raise UserError(f"The system prompt has {fault}", where="--system-prompt", fix="Remove the marks.")
    return {"text": normalize(text)}


def system_prompt(adapter: Adapter, dataset: Path) -> SystemPrompt:
    """Return the system prompt that an adapter was trained with.

    Older lineages do not record the prompt. Then the dataset version contains it, if available.
    """
    recorded = adapter.lineage.get(KEY)
    if recorded is not None:
        return _from_record(recorded)
    if adapter.dataset is None:
        return SystemPrompt(None, _IMPORTED)
    try:
        version = load_version(dataset, adapter.dataset)
    except UserError as error:
        return SystemPrompt(
            None,
            "the adapter's lineage does not record its system prompt, and its dataset version cannot be read "
            f"({error.what})",
        )
    return _from_record(count_system_turns(version.domain_of("train")))


def _from_record(record: Mapping[str, Any]) -> SystemPrompt:
    if record["text"] is not None or not record["distinct"]:
        return SystemPrompt(record["text"])
    turns = f"{record['distinct']:,} different system turns" if record["distinct"] > 1 else "a system turn"
    if record["without"]:
        some = f"{record['rows'] - record['without']:,} of its {record['rows']:,} training rows have {turns}"
        return SystemPrompt(None, f"{some}, and {record['without']:,} have none")
    return SystemPrompt(None, f"its {record['rows']:,} training rows have {turns}")


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

    adapter: Adapter
    dataset: DatasetTrace | None
    system_prompt: SystemPrompt
    """The prompt that the adapter was trained with."""

    @property
    def parents(self) -> list[dict[str, Any]]:
        """Name, digest and dataset version of the adapter that it started from, and of its parents."""
        return [
            {"name": each["name"], "digest": each["digest"], "dataset": each["dataset"]["digest"]}
            for each in islice(ancestors(self.adapter.lineage), 1, None)
        ]

    def as_dict(self, *, rows: bool) -> dict[str, Any]:
        """Return the trace for ``--json``, with or without the rows' keys."""
        adapter, lineage = self.adapter, self.adapter.lineage
        dataset = None if self.dataset is None else asdict(self.dataset)
        for split in dataset["splits"] if dataset and not rows else ():
            del split["keys"]
        preferences = lineage.get("preferences")
        return {
            "name": adapter.name,
            "digest": adapter.digest,
            "created": lineage["created"],
            "base": lineage["base"],
            "template": lineage["template_digest"],
            "config": lineage.get("config"),
            "seed": lineage.get("seed"),
            "dataset": dataset,
            "system_prompt": asdict(self.system_prompt),
            "replayed": len(adapter.replayed),
            "parents": self.parents,
            "preferences": preferences and {key: value for key, value in preferences.items() if key != "rows"},
            "training": lineage.get("training"),
            "stated": lineage.get("stated"),
            "imported": adapter.imported,
            "packages": lineage.get("packages", {}),
        }


def trace(adapter: Adapter, dataset: Path) -> Trace:
    """Trace an adapter's lineage."""
    lineage = adapter.lineage
    traced = _dataset(lineage, dataset) if "dataset" in lineage else None
    return Trace(adapter, traced, system_prompt(adapter, dataset))


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
    """Return the versions of Python and of the packages that affect numbers, for a base with this quantization."""
    names = (*_PACKAGES, "bitsandbytes") if quantization == "nf4" else _PACKAGES
    return {"python": platform.python_version(), **{name: package_version(name) for name in names}}


def training_lineage(config: Config, version: DatasetVersion, base: Base, chat: ChatFormat) -> dict[str, Any]:
    """Return the lineage without the training's results; ``created`` is UTC, ISO 8601."""
    thinking = sum(member.example.has_reasoning for member in version.domain_of("train"))
    return {
        "schema_version": 2,
        "created": now(),
        "dataset": {
            "digest": version.digest,
            "splits": {s: {"digest": version.split_digest(s), "examples": len(version.examples(s))} for s in SPLITS},
            "mix": version.manifest.mix.model_dump(mode="json") if version.manifest.mix else None,
        },
        KEY: count_system_turns(version.domain_of("train")),
        "base": {"spec": base.spec, "commit": base.commit, "digest": base.digest, "files": base.files},
        "template_digest": chat.digest,
        "chat": chat.description,
        **({"reasoning": {"mode": chat.reasoning, "rows": thinking}} if thinking else {}),
        "config": config.deciding(),
        "seed": config.seed,
        "packages": packages(config.train.quantization),
    }
