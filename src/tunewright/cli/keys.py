"""``keys``: the keys whose signatures of adapters a project trusts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer._click.exceptions import UsageError
from typer.core import TyperGroup

from tunewright.cli.app import DEPLOY, command, group
from tunewright.cli.console import Session
from tunewright.render.blocks import Table, table, words

if TYPE_CHECKING:
    from tunewright.adapters.keys import KnownKey

REMOVED: Final = {
    "create": "`ssh-keygen -t ed25519` creates a key, and `tunewright keys trust ~/.ssh/id_ed25519.pub` trusts it.",
    "passphrase": "`ssh-keygen -p -f FILE` changes a passphrase.",
    "show": "The file FILE.pub is the public half of a key, and `ssh-keygen -y -f FILE` prints it.",
}
"""Former commands, and what does their work."""


class _Keys(TyperGroup):
    """The group's commands; a former one is refused with its replacement."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in REMOVED:
            raise UsageError(f"`keys {cmd_name}` was removed. {REMOVED[cmd_name]}", ctx)
        return super().get_command(ctx, cmd_name)


keys_app = group("keys", DEPLOY, "List, trust and revoke the keys that sign adapters.", cls=_Keys)


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
