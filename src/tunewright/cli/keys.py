"""``keys``: keys that adapters are signed with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from tunewright.cli.app import DEPLOY, command, group
from tunewright.cli.console import Session
from tunewright.core.clock import without_milliseconds

if TYPE_CHECKING:
    from tunewright.adapters.signing_keys import KnownKey

keys_app = group("keys", DEPLOY, "Manage the keys that sign adapters, and which of them a project trusts.")


@command(keys_app, "create", example="tunewright keys create ann", status=False)
def keys_create(run: Session, name: Annotated[str, typer.Argument(help="Name of the key, such as your own.")]) -> None:
    """Create a personal key (Ed25519).

    The private half stays in your data folder, encrypted with a passphrase. Without a terminal the passphrase comes
    from the file that TUNEWRIGHT_KEY_PASSPHRASE_FILE names, or from TUNEWRIGHT_KEY_PASSPHRASE.
    """
    key = run.unopened.keys.create(name)
    run.show(
        {"name": key.name, "id": key.id, "path": str(key.path), "public_key": key.public_key},
        f"New key {key.name}, ID {key.id[:16]}: {key.path}\n"
        f"A project signs with it once it trusts it: tunewright keys trust {key.name}",
    )


@command(keys_app, "passphrase", example="tunewright keys passphrase ann", status=False)
def keys_passphrase(run: Session, name: Annotated[str, typer.Argument(help="Name of one of your keys.")]) -> None:
    """Change the passphrase of a key, or encrypt a key that has none.

    Without a terminal the new passphrase comes from the file that TUNEWRIGHT_KEY_NEW_PASSPHRASE_FILE names, or from
    TUNEWRIGHT_KEY_NEW_PASSPHRASE.
    """
    key = run.unopened.keys.passphrase(name)
    run.show({"name": key.name, "id": key.id, "path": str(key.path)}, f"New passphrase for {key.name}: {key.path}")


@command(keys_app, "list", example="tunewright keys list")
def keys_list(run: Session) -> None:
    """List your own keys and those that the project trusts or has trusted."""
    found = run.project.keys.list()
    document = {"keys": found}
    run.show(document, keys_table(found) if found else "No key yet: `tunewright keys create NAME` makes one.")


@command(keys_app, "show", example="tunewright keys show ann", status=False)
def keys_show(run: Session, name: Annotated[str, typer.Argument(help="Name of a key.")]) -> None:
    """Print the public half of a key on stdout, for others to trust."""
    public = run.unopened.keys.show(name)
    run.show({"name": name, "public_key": public})
    if not run.as_json:
        run.print_out(public)


@command(keys_app, "trust", example="tunewright keys trust ann.pem --name ann")
def keys_trust(
    run: Session,
    key: Annotated[str, typer.Argument(help="Name of your key, or file with a public key.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the key in this project.", show_default="the key's or the file's")
    ] = None,
) -> None:
    """Trust a key in this project. Once a key is trusted, only adapters signed by a trusted key are served."""
    trusted = run.project.keys.trust(key, name)
    run.show(trusted, f"Trusted from now on: {trusted.name}, ID {trusted.id[:16]}")


@command(keys_app, "revoke", example="tunewright keys revoke ann --because 'laptop stolen'")
def keys_revoke(
    run: Session,
    name: Annotated[str, typer.Argument(help="Name of a key that the project trusts.")],
    because: Annotated[str, typer.Option(help="Reason, which is stored.")],
) -> None:
    """Stop trusting a key, and everything that it has signed."""
    revoked = run.project.keys.revoke(name, because)
    run.show(revoked, f"No longer trusted: {revoked.name}, ID {revoked.id[:16]}")


def keys_table(keys: Sequence[KnownKey]) -> Table:
    """Return the table of keys."""
    table = Table()
    for name in ("key", "ID", "yours", "trusted by the project"):
        table.add_column(name)
    for key in keys:
        table.add_row(key.name, key.id[:16], _owner(key), Text(_trust(key)))
    return table


def _owner(key: KnownKey) -> str:
    if not key.own:
        return ""
    return "yes" if key.encrypted else "yes, not encrypted"


def _trust(key: KnownKey) -> str:
    if key.trusted is None:
        return "no"
    called = f", as {key.trusted.name}" if key.trusted.name != key.name else ""
    if key.trusted.revoked:
        gone = key.trusted.revoked
        return f"revoked {without_milliseconds(gone.at)}{_by(gone.by)}: {gone.because}{called}"
    return f"since {without_milliseconds(key.trusted.trusted.at)}{_by(key.trusted.trusted.by)}{called}"


def _by(name: str | None) -> str:
    return f" by {name}" if name else ""
