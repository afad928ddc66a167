"""Stored adapters: what they were made of, who stands for them, and which ones come in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import CANT_TELL, FAILED, session

# As in config.section, which is too heavy to import for --help.
Quantize = Literal["none", "nf4"]

Adapter = Annotated[str | None, typer.Argument(help="The adapter's name, or its beginning.", show_default="the newest")]

adapters_app = typer.Typer(help="Stored adapters.", no_args_is_help=True)
app.add_typer(adapters_app, name="adapters")


@adapters_app.command("list")
def adapters_list(project: Folder = HERE, json: Json = False) -> None:
    """List the stored adapters, the newest last."""
    import tunewright
    from tunewright.cli.adapter_tables import adapter_row, adapters_table

    with session(json, project) as current:
        rows = [adapter_row(adapter) for adapter in tunewright.open(project).adapters.list()]
        current.show({"adapters": rows}, adapters_table(rows) if rows else "No adapter has been trained yet.")


@adapters_app.command("show")
def adapters_show(
    adapter: Adapter = None,
    rows: Annotated[
        bool,
        typer.Option("--rows", help="Print every row it was made of, a line each: split, use, key. The tree: stderr."),
    ] = False,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """What an adapter was made of, as a tree down to the rows. The other way round: tunewright data where ROW."""
    import tunewright
    from tunewright.cli.adapter_tables import lineage_tree, row_lines

    with session(json, project) as current:
        shown = tunewright.open(project, current.reporter).adapters.show(adapter)
        lines = row_lines(shown.trace) if rows else None
        current.show(shown.as_dict(rows=rows), lineage_tree(shown), alone=lines)


@adapters_app.command("verify")
def adapters_verify(
    adapters: Annotated[
        list[str] | None, typer.Argument(help="Adapters, by name or its beginning.", show_default="all")
    ] = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Check every file, weight and signature.

    Exit code 0: all as stored and signed by a key that the project trusts; 1: one was changed, or its key revoked; 4:
    whole, but unsigned or signed by a key that is not trusted, so that who made it cannot be told.
    """
    import tunewright
    from tunewright.cli.adapter_tables import standings_table

    with session(json, project) as current:
        found = tunewright.open(project, current.reporter).adapters.verify(adapters or ())
        document = {"adapters": [each.as_dict() for each in found]}
        current.show(document, standings_table(found) if found else "There is no adapter.")
        states = {each.state for each in found}
        if states & {"tampered", "revoked"}:
            raise typer.Exit(FAILED)
        if states & {"unsigned", "untrusted"}:
            raise typer.Exit(CANT_TELL)


@adapters_app.command("sign")
def adapters_sign(
    adapter: Adapter = None,
    key: Annotated[
        str | None, typer.Option(help="Your key.", show_default="the only one that the project trusts")
    ] = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Stand for an adapter as it is: sign the digests of all its files and of what it was made of."""
    import tunewright

    with session(json, project) as current:
        signed, name, now = tunewright.open(project, current.reporter).adapters.sign(adapter, key=key)
        told = f"{signed.name}: signed by {name}" + ("" if now else " already")
        current.show({"adapter": signed.name, "key": name, "signed_now": now}, told)


@adapters_app.command("import")
def adapters_import(
    source: Annotated[Path, typer.Argument(help="A folder, or a zip or tar archive.")],
    name: Annotated[
        str | None, typer.Option(help="What it is to be called.", show_default="as the folder or archive is")
    ] = None,
    base_matches: Annotated[
        bool,
        typer.Option(
            "--base-matches",
            help="You state that it was trained on this project's base and chat template, where it does not say so "
            "by digest. Its lineage says who stated it.",
        ),
    ] = False,
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="You state how the base was held in its training.", show_default="none"),
    ] = None,
    system_prompt: Annotated[
        str | None,
        typer.Option(help="You state that all its training rows had this system turn.", show_default="not known"),
    ] = None,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Let it in without a signature of a key that the project trusts.")
    ] = False,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Let a foreign adapter in, if nothing is wrong with it: only plain LoRA weights that fit the base, and no code."""
    import tunewright

    with session(json, project) as current:
        opened = tunewright.open(project, current.reporter).adapters
        got = opened.import_(
            source,
            name=name,
            base_matches=base_matches,
            quantize=quantize,
            unsigned=unsigned,
            system_prompt=system_prompt,
        )
        told = f"{'Imported' if got.new else 'There already'}: {got.adapter.name}, {got.signed}; lineage: {got.lineage}"
        current.show(got.as_dict(), told)


@adapters_app.command("scale")
def adapters_scale(
    adapter: Adapter = None,
    factor: Annotated[
        list[float] | None,
        typer.Option(help="What the adapter's change is multiplied by; several.", show_default="0.25, 0.5, 0.75, 1"),
    ] = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Against forgetting: keep less of an adapter, where that loses nothing on dev. Writes a new adapter.

    Of the scales that lose less than evaluate.margin on dev against the best, the one is kept that forgets least.
    """
    import tunewright
    from tunewright.cli.tables import scales_table

    with session(json, project) as current:
        result = tunewright.open(project, current.reporter).adapters.scale(adapter, factor)
        new = f"New adapter: {result.adapter.folder}"
        kept = f"{result.parent.name} is best as it is; no new adapter."
        current.show(result.as_dict(), scales_table(result), new if result.adapter != result.parent else kept)
