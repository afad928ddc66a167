"""Keys that adapters are signed with."""

from __future__ import annotations

from typing import Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import session

keys_app = typer.Typer(help="Keys that sign adapters: your own, and those that a project trusts.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")


@keys_app.command("new")
def keys_new(
    name: Annotated[str, typer.Argument(help="What it is called, such as your own name.")],
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Make a key of your own (Ed25519). Its private half stays in your data folder, readable by you alone."""
    from tunewright.api import Project
    from tunewright.config.project import ProjectFolder

    with session(json) as current:
        # Not opened as a project: a key belongs to a person.
        key = Project(ProjectFolder(project), current.reporter).keys.new(name)
        current.show(
            {"name": key.name, "id": key.id, "path": str(key.path), "public_key": key.public_key},
            f"New key {key.name}, ID {key.id[:16]}: {key.path}\n"
            f"A project signs with it once it trusts it: tunewright keys trust {key.name}",
        )


@keys_app.command("list")
def keys_list(project: Folder = HERE, json: Json = False) -> None:
    """List your own keys and those that the project trusts or did."""
    import tunewright
    from tunewright.cli.adapter_tables import keys_table

    with session(json, project) as current:
        found = tunewright.open(project, current.reporter).keys.list()
        document = {"keys": [key.as_dict() for key in found]}
        current.show(document, keys_table(found) if found else "No key yet: tunewright keys new NAME makes one.")


@keys_app.command("show")
def keys_show(
    name: Annotated[str, typer.Argument(help="One of your own keys, or of the project's.")],
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Print the public half of a key, for others to trust: keys show NAME > NAME.pem"""
    from tunewright.api import Project
    from tunewright.config.project import ProjectFolder

    with session(json) as current:
        public = Project(ProjectFolder(project), current.reporter).keys.show(name)
        current.show({"name": name, "public_key": public})
        if not json:
            current.print_out(public)


@keys_app.command("trust")
def keys_trust(
    key: Annotated[str, typer.Argument(help="One of your own keys, or a file with a public key.")],
    name: Annotated[
        str | None, typer.Option(help="What the project calls it.", show_default="the key's or the file's name")
    ] = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Let the project trust a key. From the first one on, only adapters that a trusted key signed are served."""
    import tunewright

    with session(json, project) as current:
        trusted = tunewright.open(project, current.reporter).keys.trust(key, name)
        told = f"Trusted from now on: {trusted.name}, ID {trusted.id[:16]}"
        current.show(trusted.model_dump(mode="json"), told)


@keys_app.command("revoke")
def keys_revoke(
    name: Annotated[str, typer.Argument(help="A key that the project trusts.")],
    because: Annotated[str, typer.Option(help="Why; it is kept.")],
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Trust a key no longer: what it signed, whenever that was, counts for nothing."""
    import tunewright

    with session(json, project) as current:
        revoked = tunewright.open(project, current.reporter).keys.revoke(name, because)
        current.show(revoked.model_dump(mode="json"), f"No longer trusted: {revoked.name}, ID {revoked.id[:16]}")
