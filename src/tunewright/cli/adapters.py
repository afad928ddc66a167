"""``adapters`` and ``keys``: stored adapters, and the keys whose signatures of them a project trusts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from tunewright.adapters.foreign import ImportOptions
from tunewright.cli.app import DEPLOY, TRAIN, Adapter, command, group
from tunewright.cli.console import CANT_TELL, FAILED, Session
from tunewright.core.clock import without_milliseconds
from tunewright.core.text import count_of
from tunewright.render.blocks import Table, table, words

if TYPE_CHECKING:
    from tunewright.adapters.keys import KnownKey
    from tunewright.adapters.lineage import DatasetTrace, Trace
    from tunewright.adapters.registry import Adapter as StoredAdapter
    from tunewright.evaluation.stored import AdapterDetails

_SHORT = 12

adapters_app = group("adapters", TRAIN, "List, inspect, verify, sign, push and import adapters.")


@command(adapters_app, "list", example="tunewright adapters list")
def adapters_list(run: Session) -> None:
    """List the stored adapters, the newest last."""
    from tunewright.core.numbers import read_numbers

    numbers = read_numbers(run.project.folder.adapters)
    rows = [{"number": numbers.get(adapter.name), **adapter_row(adapter)} for adapter in run.project.adapters.list()]
    run.show({"adapters": rows}, adapters_table(rows) if rows else "No adapter has been trained yet.")


@command(adapters_app, "show", example="tunewright adapters show legal-4f1c02a9")
def adapters_show(
    run: Session,
    adapter: Adapter = None,
    rows: Annotated[
        bool,
        typer.Option("--rows", help="Print every row on stdout, one per line (split, use, key); the tree on stderr."),
    ] = False,
) -> None:
    """Show what an adapter was made of, as a tree down to the rows. `tunewright data trained-by ROW` is the reverse."""
    shown = run.project.adapters.show(adapter)
    lines = row_lines(shown.trace) if rows else None
    run.show(shown.as_dict(rows=rows), lineage_tree(shown), alone=lines)


@command(adapters_app, "verify", example="tunewright adapters verify")
def adapters_verify(
    run: Session,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(help="Adapter names, numbers or first characters.", show_default="all"),
    ] = None,
) -> int | None:
    """Check every file, weight and signature.

    Exit code 0: all unchanged and signed by a key that the project trusts. 1: an adapter was changed, or its key was
    revoked. 4: unchanged, but unsigned, signed by a key that is not trusted, or not checked for lack of ssh-keygen.
    """
    found = run.project.adapters.verify(adapters or ())
    document = {"adapters": found}
    rows = ((each.adapter, each.state, "; ".join(each.reasons)) for each in found)
    shown = table("Status of adapters", words("Adapter", "State", "Why"), rows)
    run.show(document, shown if found else "No adapter is stored.")
    states = {each.state for each in found}
    if states & {"tampered", "revoked"}:
        return FAILED
    return CANT_TELL if states & {"unsigned", "untrusted", "not checked"} else None


@command(adapters_app, "sign", example="tunewright adapters sign legal-4f1c02a9 --key ann")
def adapters_sign(
    run: Session,
    adapter: Adapter = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="File of your key, or its name in the project. TUNEWRIGHT_SIGNING_KEY names a file too.",
            show_default="the only one of your keys that the project trusts",
        ),
    ] = None,
) -> None:
    """Sign the digests of all files of an adapter and of its lineage, with ssh-keygen."""
    signed, name, now = run.project.adapters.sign(adapter, key=key)
    text = f"{signed.name}: {'' if now else 'already '}signed by {name}"
    run.show({"adapter": signed.name, "key": name, "signed_now": now}, text)


@command(adapters_app, "push", example="tunewright adapters push s3://team-bucket/adapters legal-4f1c02a9")
def adapters_push(
    run: Session,
    url: Annotated[str, typer.Argument(help="Folder or any URL that fsspec supports, such as s3://bucket/prefix.")],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(help="Adapter names, numbers or first characters.", show_default="the newest"),
    ] = None,
) -> None:
    """Copy adapters to a shared folder or bucket, for `adapters import` and for servers (serve.adapter_store)."""
    pushed = run.project.adapters.push(url, adapters or ())
    lines = [
        f"Copied {each.adapter}: {each.bytes:,} bytes." if each.new else f"{each.adapter} was there already."
        for each in pushed
    ]
    run.show({"adapters": pushed}, "\n".join(lines))


@command(adapters_app, "import", example="tunewright adapters import legal-lora --unsigned", options=ImportOptions)
def adapters_import(
    run: Session,
    source: Annotated[str, typer.Argument(help="Folder, or URL of a pushed adapter (s3://bucket/NAME-DIGEST).")],
    options: ImportOptions = ImportOptions(),
) -> None:
    """Import a foreign adapter after checking it: only plain LoRA weights that fit the base, and no code."""
    imported = run.project.adapters.import_(source, options)
    done = "Imported" if imported.new else "Already imported"
    text = f"{done}: {imported.adapter.name}, {imported.signed}; lineage: {imported.lineage}"
    run.show(imported.as_dict(), text)


def adapter_row(adapter: StoredAdapter) -> dict[str, Any]:
    """Return an adapter as a row of the list."""
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
    """Return the table of stored adapters."""
    found = []
    for row in rows:
        dataset = row["dataset"][:_SHORT] if row["dataset"] else "unknown"
        dataset += ", imported" if row["imported"] else ""
        made = without_milliseconds(row["created"])
        found.append((str(row["number"] or ""), row["name"], made, dataset, row["base"], ", ".join(row["checkpoints"])))
    return table("Adapters", ("No.", *words("Adapter", "Created", "Dataset", "Base", "Checkpoints")), found)


def lineage_tree(shown: AdapterDetails) -> Tree:
    """Return an adapter's base, data, training and evaluations as a tree."""
    trace, adapter, lineage = shown.trace, shown.trace.adapter, shown.trace.adapter.lineage
    tree = Tree(Text(f"{adapter.name}, made {without_milliseconds(lineage['created'])}"))
    standing = _add(tree, f"digest {adapter.digest[:_SHORT]}, {shown.standing.state}")
    for reason in shown.standing.reasons:
        _add(standing, reason)
    if imported := adapter.imported:
        at = without_milliseconds(imported["at"])
        _add(tree, f"imported {at} from {imported['source']}{_by(imported['by'])}")
    if "config" in lineage:
        train = lineage["config"]["train"]
        config = _add(tree, f"config, seed {lineage.get('seed')}")
        _add(config, f"LoRA on {', '.join(train['target_modules'])}")
        _add(config, f"rank {train['lora_r']}, alpha {train['lora_alpha']}, learning rate {train['learning_rate']:g}")
        _add(config, f"{count_of(train['epochs'], 'epoch')} in batches of {train['batch_size']}")
    # For a foreign adapter without a lineage, a person states base and template.
    stated = f" (as stated{_by(lineage['stated']['by'])}, not verified)" if "stated" in lineage else ""
    base = _add(tree, f"base {lineage['base']['spec']}, digest {lineage['base']['digest'][:_SHORT]}{stated}")
    if lineage["base"]["commit"]:
        _add(base, f"commit {lineage['base']['commit']}")
    for name, sha256 in lineage["base"]["files"].items():
        _add(base, f"{name} {sha256[:_SHORT]}")
    _add(tree, f"chat template, digest {lineage['template_digest'][:_SHORT]}{stated}")
    if trace.dataset:
        _dataset(tree, trace.dataset)
    else:
        _add(tree, "dataset: unknown; it was trained elsewhere and came without lineage")
    _add(tree, f"system prompt: {trace.system_prompt.shown}")
    for parent in trace.parents:
        _add(tree, f"started from {parent['name']}, trained on dataset version {parent['dataset'][:_SHORT]}")
    if tuned := lineage.get("preferences"):
        given = f"{tuned['answers']['chosen']:,} chosen and {tuned['answers']['rejected']:,} rejected answers"
        _add(tree, f"{tuned['method'].upper()} on {given}, digest {tuned['digest'][:_SHORT]}")
    if replayed := len(adapter.replayed):
        _add(tree, f"replay: {replayed:,} conversations that the base wrote (replay.jsonl)")
    if training := lineage.get("training"):
        _add(tree, f"training: step {training['kept_step']} kept, {training['seconds']:,.0f} s on {training['device']}")
    if known := lineage.get("packages"):
        packages = _add(tree, "packages")
        for name, version in known.items():
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


def _dataset(tree: Tree, dataset: DatasetTrace) -> None:
    here = "here, its rows as named" if dataset.found else dataset.why_not
    branch = _add(tree, f"dataset version {dataset.digest[:_SHORT]}: {here}")
    for split in dataset.splits:
        trained = {"train": "trained on", "dev": "which chose the checkpoint", "test": "held out"}[split.split]
        out = f", {len(split.left_out):,} of them left out" if split.left_out else ""
        rows = "row" if split.rows == 1 else "rows"
        _add(branch, f"{split.split}: {split.rows:,} {rows}, {trained}{out}; digest {split.digest[:_SHORT]}")
    if dataset.mix:
        mixed = dataset.mix
        _add(branch, f"of the training rows {mixed['drawn']:,} are of the mix-in {mixed['source']['name']}")


def row_lines(trace: Trace) -> str:
    """Return the rows of the dataset version, one per line: split, use in training, key."""
    lines = []
    for split in trace.dataset.splits if trace.dataset else ():
        out = set(split.left_out)
        use = {"train": "trained", "dev": "dev", "test": "test"}[split.split]
        lines += [f"{split.split}\t{'left out' if key in out else use}\t{key}\n" for key in split.keys or ()]
    return "".join(lines)


keys_app = group("keys", DEPLOY, "List, trust and revoke the keys that sign adapters.")


@command(keys_app, "list", example="tunewright keys list")
def keys_list(run: Session) -> None:
    """List the keys that the project trusts or has revoked."""
    found = run.project.keys.list()
    run.show({"keys": found}, keys_table(found) if found else "No key yet: `tunewright keys trust FILE` adds one.")


@command(keys_app, "trust", example="tunewright keys trust ann.pub --name ann")
def keys_trust(
    run: Session,
    key: Annotated[str, typer.Argument(help="File with a public key, such as ~/.ssh/id_ed25519.pub.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the key in this project.", show_default="the file's")
    ] = None,
) -> None:
    """Trust a key in this project. Once a key is trusted, only adapters signed by a trusted key are served."""
    trusted = run.project.keys.trust(key, name)
    run.show(trusted, f"Trusted from now on: {trusted.name}, {trusted.id}")


@command(keys_app, "revoke", example="tunewright keys revoke ann --because 'laptop stolen'")
def keys_revoke(
    run: Session,
    name: Annotated[str, typer.Argument(help="Name of a key that the project trusts.")],
    because: Annotated[str, typer.Option(help="Reason, which is stored.")],
) -> None:
    """Stop trusting a key, and everything that it has signed."""
    revoked = run.project.keys.revoke(name, because)
    run.show(revoked, f"No longer trusted: {revoked.name}, {revoked.id}")


def keys_table(keys: Sequence[KnownKey]) -> Table:
    """Return the table of keys."""
    rows = []
    for key in keys:
        revoked = key.trusted.revoked
        trust = f"trusted{key.trusted.trusted}" if revoked is None else f"revoked{revoked}"
        rows.append((key.name, key.id, "yes" if key.own else "", trust, key.trusted.options))
    return table("Keys", words("Key", "ID", "Yours", "Trusted by the project", "Options"), rows)
