"""The adapter that a run starts from (train.from): found, checked against the config, and recorded in the lineage."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tunewright.adapters.registry import CONFIG, Adapter, find_adapter, list_adapters, require_compatible
from tunewright.config import TrainConfig
from tunewright.config.project import ProjectFolder
from tunewright.config.train import EXPERTS
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.text import listed
from tunewright.data.trace import ancestors, trained_keys
from tunewright.data.versions import DatasetVersion, list_versions, short
from tunewright.models.bases import Base

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat

_WHERE = "train.from"
_DIGEST = re.compile(r"[0-9a-f]{12,64}")
_MOST = 10


def find_parent(project: ProjectFolder) -> Adapter | None:
    """Return the adapter that ``train.from`` names by its name, a beginning of it, or its digest; None if unset."""
    named = project.config.train.from_
    if named is None:
        return None
    if _DIGEST.fullmatch(named):
        found = [a for a in list_adapters(project.adapters) if a.digest.startswith(named)]
        if len(found) == 1:
            return found[0]
    try:
        return find_adapter(project.adapters, named)
    except UserError as error:
        raise UserError(error.what, where=_WHERE, fix=error.fix) from None


def parent_inputs(project: ProjectFolder) -> dict[str, Any]:
    """Return the parent as an input of a training; empty without one."""
    parent = find_parent(project)
    return {} if parent is None else {"from": parent.digest}


def require_parent(
    project: ProjectFolder, version: DatasetVersion, base: Base, chat: ChatFormat, reporter: Reporter
) -> Adapter | None:
    """Return the parent after all checks; None if the config names none.

    Rows that the parent was trained on and that the version no longer has are a warning.
    """
    parent = find_parent(project)
    if parent is None:
        return None
    if parent.dataset is None or (parent.imported is not None and not parent.imported["signed"]):
        raise UserError(
            f"{parent.name} is a foreign adapter: it is not known if it was trained on held-out rows",
            where=_WHERE,
            fix="Name an adapter that this project trained, or that a key you trust has signed.",
        )
    require_compatible(parent, base, chat)
    _require_same_settings(parent, project.config.train)
    _require_nothing_held_out(parent, project, version, reporter)
    return parent


def _require_same_settings(parent: Adapter, settings: TrainConfig) -> None:
    stored: Mapping[str, Any] = json.loads((parent.folder / CONFIG).read_text(encoding="utf-8"))
    pairs = {
        "target_modules": (
            sorted([*stored["target_modules"], *([EXPERTS] if stored.get("target_parameters") else [])]),
            sorted(settings.target_modules),
        ),
        "lora_r": (stored["r"], settings.lora_r),
        "lora_alpha": (stored["lora_alpha"], settings.lora_alpha),
        "use_rslora": (bool(stored.get("use_rslora")), settings.use_rslora),
        "use_dora": (bool(stored.get("use_dora")), settings.use_dora),
        "quantization": (parent.quantization, settings.quantization),
    }
    other = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if not other:
        return

    def shown(value: Any) -> str:
        return f"[{', '.join(value)}]" if isinstance(value, list) else str(value).lower()

    raise UserError(
        f"{parent.name} has other LoRA settings than the config: "
        + "; ".join(f"{key} is {shown(theirs)}, not {shown(own)}" for key, (theirs, own) in other.items()),
        where=_WHERE,
        fix=f"Set {', '.join(f'train.{key}: {shown(theirs)}' for key, (theirs, _) in other.items())}.",
    )


def _require_nothing_held_out(
    parent: Adapter, project: ProjectFolder, version: DatasetVersion, reporter: Reporter
) -> None:
    """Check that no row that the parent or its own parents were trained on is in dev or test now."""
    known = {manifest.digest for manifest in list_versions(project.dataset)}
    held_out = {m.key: m.split for m in version.members if m.split != "train"}
    there = {m.key for m in version.members} | set(version.purged)
    seen: set[str] = set()
    for lineage in ancestors(parent.lineage):
        digest = str(lineage["dataset"]["digest"])
        if digest not in known:
            raise UserError(
                f"{parent.name} was trained on dataset version {short(digest)}, which is missing: its rows may be held "
                "out now",
                where=_WHERE,
                fix="Get the version back, from its remote for example: tunewright data pull.",
            )
        seen |= trained_keys(project.dataset, lineage)
    if crossed := sorted(seen & held_out.keys()):
        rows = listed((f"row {short(key)} is in {held_out[key]}" for key in crossed), len(crossed), _MOST, "")
        raise UserError(
            f"{parent.name} was trained on {len(crossed):,} rows that version {short(version.digest)} holds out\n"
            f"{rows}",
            where=_WHERE,
            fix="Train without train.from, or on a version with the parent's splits.",
        )
    if gone := len(seen - there):
        reporter.warn(
            f"{parent.name} was trained on {gone:,} row{'' if gone == 1 else 's'} that version "
            f"{short(version.digest)} no longer has. What it learned from them remains in the new adapter."
        )


_RECORDED = ("dataset", "rendering", "preferences", "parent")


def parent_lineage(parent: Adapter | None) -> dict[str, Any]:
    """Return the lineage entry of the parent, with the rows that it and its own parents saw; empty without one.

    The entry is complete, so that a row is traced to this adapter even after the parent's folder is gone.
    """
    if parent is None:
        return {}
    kept = {key: parent.lineage[key] for key in _RECORDED if key in parent.lineage}
    return {"parent": {"name": parent.name, "digest": parent.digest, **kept}}


def require_new_adapter(settings: TrainConfig, command: str) -> None:
    """Check that the config trains a new adapter on the ideal outputs, which ``command`` measures."""
    if settings.from_ is None and not settings.prefers:
        return
    key, value = ("from", settings.from_) if settings.from_ is not None else ("method", settings.method)
    raise UserError(
        f"{command} trains new adapters on the ideal outputs of a part of the rows, but train.{key} is {value}",
        where=f"train.{key}",
        fix=f"Remove train.{key} for this command.",
    )
