"""From the schema of an earlier tunewright to the present one, where a state is opened."""

from __future__ import annotations

from sqlalchemy import select, text, update

from tunewright.serving.state.audit import changing
from tunewright.serving.state.database import Database
from tunewright.serving.state.tables import SCHEMA_VERSION, schema

_STATEMENTS = {
    # What the isolation test found is kept with a release.
    1: ("ALTER TABLE releases ADD COLUMN isolation JSON", "ALTER TABLE releases ADD COLUMN untested TEXT"),
}
"""What leads from each version to the next one; SQLite and PostgreSQL both understand it."""


def upgrade(database: Database, actor: str | None) -> None:
    """Bring the tables up to date, in one transaction with the audit's line that tells of it."""
    with database.reading() as connection:
        if connection.execute(select(schema.c.version)).scalar_one() == SCHEMA_VERSION:
            return
    with changing(database, actor) as change:
        version = change.connection.execute(select(schema.c.version)).scalar_one()
        if version == SCHEMA_VERSION:
            return  # another process has done it meanwhile
        for step in range(version, SCHEMA_VERSION):
            for statement in _STATEMENTS[step]:
                change.connection.execute(text(statement))
        change.connection.execute(update(schema).values(version=SCHEMA_VERSION))
        change.log("schema.upgrade", "state", before=version, after=SCHEMA_VERSION)
