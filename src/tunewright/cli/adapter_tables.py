"""Stored adapters and keys, as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from tunewright.core.clock import to_the_second

if TYPE_CHECKING:
    from tunewright.adapters.lineage import DatasetTrace, Trace
    from tunewright.adapters.registry import Adapter
    from tunewright.adapters.trust import Standing
    from tunewright.api.adapters import Shown
    from tunewright.api.keys import KnownKey

_SHORT = 12


def adapter_row(adapter: Adapter) -> dict[str, Any]:
    """An adapter as a line of the list."""
    return {
        "name": adapter.name,
        "digest": adapter.digest,
        "created": adapter.lineage["created"],
        "dataset": adapter.dataset,
        "base": adapter.lineage["base"]["spec"],
        "imported": adapter.imported is not None,
        "checkpoints": list(adapter.checkpoints),
    }


def adapters_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Stored adapters."""
    table = Table()
    for name in ("adapter", "created", "dataset", "base", "checkpoints"):
        table.add_column(name, no_wrap=name == "adapter")
    for row in rows:
        dataset = row["dataset"][:_SHORT] if row["dataset"] else "not known"
        dataset += ", imported" if row["imported"] else ""
        table.add_row(row["name"], to_the_second(row["created"]), dataset, row["base"], ", ".join(row["checkpoints"]))
    return table


def standings_table(found: Sequence[Standing]) -> Table:
    """What each adapter is worth."""
    table = Table()
    for name in ("adapter", "state", "why"):
        table.add_column(name)
    for each in found:
        table.add_row(each.adapter, each.state, Text("; ".join(each.reasons)))
    return table


def lineage_tree(shown: Shown) -> Tree:
    """All that an adapter was made of."""
    trace = shown.trace
    tree = Tree(Text(f"{trace.name}, made {to_the_second(trace.created)}"))
    standing = _add(tree, f"digest {trace.digest[:_SHORT]}, {shown.standing.state}")
    for reason in shown.standing.reasons:
        _add(standing, reason)
    if trace.imported:
        _add(
            tree,
            f"imported {to_the_second(trace.imported['at'])} from {trace.imported['source']}"
            + _by(trace.imported["by"]),
        )
    if trace.scaled:
        _add(tree, f"{trace.scaled['parent']} times {trace.scaled['factor']:g}")
    if trace.config:
        train = trace.config["train"]
        config = _add(tree, f"config, seed {trace.seed}")
        _add(config, f"LoRA on {', '.join(train['target_modules'])}")
        _add(config, f"rank {train['lora_r']}, alpha {train['lora_alpha']}, learning rate {train['learning_rate']:g}")
        _add(config, f"{train['epochs']} epochs in batches of {train['batch_size']}")
    base = _add(tree, f"base {trace.base['spec']}, digest {trace.base['digest'][:_SHORT]}" + _stated(trace))
    if trace.base["commit"]:
        _add(base, f"commit {trace.base['commit']}")
    for name, sha256 in trace.base["files"].items():
        _add(base, f"{name} {sha256[:_SHORT]}")
    _add(tree, f"chat template, digest {trace.template[:_SHORT]}" + _stated(trace))
    if trace.dataset:
        _dataset(tree, trace.dataset)
    else:
        _add(tree, "dataset: not known, since it was not trained here and brought no lineage")
    _add(tree, f"system prompt: {trace.system_prompt.shown}")
    if trace.replayed:
        _add(tree, f"replay: {trace.replayed:,} conversations that the base wrote (replay.jsonl)")
    if trace.training:
        told = trace.training
        _add(tree, f"training: step {told['kept_step']} kept, {told['seconds']:,.0f} s on {told['device']}")
    packages = _add(tree, "packages") if trace.packages else tree
    for name, version in trace.packages.items():
        _add(packages, f"{name} {version}")
    for name, decision in shown.verdicts:
        _add(tree, f"evaluation {name}: {decision}")
    if not shown.verdicts:
        _add(tree, "not evaluated yet")
    return tree


def _add(tree: Tree, text: str) -> Tree:
    return tree.add(Text(text))


def _by(name: str | None) -> str:
    return f" by {name}" if name else ""


def _stated(trace: Trace) -> str:
    return "" if trace.stated is None else f" (as stated{_by(trace.stated['by'])}, not proved)"


def _dataset(tree: Tree, dataset: DatasetTrace) -> None:
    here = "here, its rows as named" if dataset.found else dataset.why_not
    branch = _add(tree, f"dataset version {dataset.digest[:_SHORT]}: {here}")
    for split in dataset.splits:
        trained = {"train": "trained on", "dev": "which chose the checkpoint", "test": "held out"}[split.split]
        out = f", {len(split.left_out):,} of them left out as too long" if split.left_out else ""
        rows = "row" if split.rows == 1 else "rows"
        _add(branch, f"{split.split}: {split.rows:,} {rows}, {trained}{out}; digest {split.digest[:_SHORT]}")
    if dataset.mix:
        mixed = dataset.mix
        _add(branch, f"of the training rows {mixed['drawn']:,} are of the mix-in {mixed['source']['name']}")


def row_lines(trace: Trace) -> str:
    """The rows of the dataset version, one a line: split, what training did with it, key."""
    lines = []
    for split in trace.dataset.splits if trace.dataset else ():
        out = set(split.left_out)
        use = {"train": "trained", "dev": "dev", "test": "test"}[split.split]
        lines += [f"{split.split}\t{'left out' if key in out else use}\t{key}\n" for key in split.keys or ()]
    return "".join(lines)


def keys_table(keys: Sequence[KnownKey]) -> Table:
    """Keys."""
    table = Table()
    for name in ("key", "ID", "yours", "trusted by the project"):
        table.add_column(name)
    for key in keys:
        table.add_row(key.name, key.id[:16], "yes" if key.own else "", Text(_trust(key)))
    return table


def _trust(key: KnownKey) -> str:
    if key.trusted is None:
        return "no"
    called = f", as {key.trusted.name}" if key.trusted.name != key.name else ""
    if key.trusted.revoked:
        gone = key.trusted.revoked
        return f"revoked {to_the_second(gone.at)}{_by(gone.by)}: {gone.because}{called}"
    return f"since {to_the_second(key.trusted.trusted.at)}{_by(key.trusted.trusted.by)}{called}"
