"""``migrate``: a hosted fine-tuning job's files as a project."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import PROJECT, command, group
from tunewright.cli.console import Session

if TYPE_CHECKING:
    from tunewright.data.migrate import Service

migrate_app = group("migrate", PROJECT, "Make a project from a hosted fine-tuning job's files.")

Job = Annotated[Path, typer.Argument(help="The job's object, as the service's API returns it (JSON).")]
Train = Annotated[Path, typer.Option("--train", help="The job's training file (JSON Lines).")]
Validation = Annotated[Path | None, typer.Option("--validation", help="The job's validation file.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the new project.")]
Base = Annotated[
    str | None, typer.Option("--base", help="Open-weight base to tune.", show_default="the job's, if it is on the hub")
]
_EXAMPLE = "tunewright migrate {} job.json --train train.jsonl --out courts"


@command(migrate_app, "openai", example=_EXAMPLE.format("openai"), status=False, project=False)
def openai(run: Session, job: Job, train: Train, out: Out, validation: Validation = None, base: Base = None) -> None:
    """Make a project from an OpenAI job: its rows, the nearest settings, its model as incumbent."""
    _migrate(run, "openai", job, train, out, validation, base)


@command(migrate_app, "together", example=_EXAMPLE.format("together"), status=False, project=False)
def together(run: Session, job: Job, train: Train, out: Out, validation: Validation = None, base: Base = None) -> None:
    """Make a project from a Together job: its rows, the nearest settings, its model as incumbent."""
    _migrate(run, "together", job, train, out, validation, base)


@command(migrate_app, "fireworks", example=_EXAMPLE.format("fireworks"), status=False, project=False)
def fireworks(run: Session, job: Job, train: Train, out: Out, validation: Validation = None, base: Base = None) -> None:
    """Make a project from a Fireworks job: its rows, the nearest settings, its model as incumbent."""
    _migrate(run, "fireworks", job, train, out, validation, base)


def _migrate(
    run: Session, service: Service, job: Path, train: Path, out: Path, validation: Path | None, base: str | None
) -> None:
    from tunewright.config.project import create_project
    from tunewright.data.migrate import described, migrate

    migration = migrate(service, job, train, validation, base)
    create_project(out, migration.files)
    for difference in migration.differences:
        run.reporter.warn(difference)
    run.show(
        {
            "project": str(out),
            "files": sorted(migration.files),
            "rows": migration.rows,
            "differences": migration.differences,
            "incumbent": migration.incumbent,
        },
        f"Wrote {', '.join(sorted(migration.files))} in {out.resolve()}",
        *described(migration),
        "Next: choose base_model in tunewright.yaml, then run there: tunewright data add "
        + " ".join(sorted(migration.rows)),
    )
