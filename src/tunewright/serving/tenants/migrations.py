"""Migrates the schema of an earlier tunewright when a state is opened."""

from __future__ import annotations

from sqlalchemy import select, text, update

from tunewright.serving.tenants.audit import changing
from tunewright.serving.tenants.database import Database
from tunewright.serving.tenants.tables import SCHEMA_VERSION, schema

_STATEMENTS = {
    # The result of the isolation test is stored with a release.
    1: ("ALTER TABLE releases ADD COLUMN isolation JSON", "ALTER TABLE releases ADD COLUMN untested TEXT"),
    # Daily totals of requests, and the last use of keys whose requests were deleted.
    2: (
        "CREATE TABLE usage_days (day INTEGER NOT NULL, tenant_id INTEGER NOT NULL REFERENCES tenants (id), "
        "alias VARCHAR(63) NOT NULL, digest VARCHAR(64) NOT NULL, requests BIGINT NOT NULL, "
        "prompt_tokens BIGINT NOT NULL, completion_tokens BIGINT NOT NULL, first_tokens BIGINT NOT NULL, "
        "first_token_s DOUBLE PRECISION NOT NULL, PRIMARY KEY (day, tenant_id, alias, digest))",
        "CREATE TABLE key_uses (key_id INTEGER NOT NULL PRIMARY KEY REFERENCES api_keys (id), "
        "last_used DOUBLE PRECISION NOT NULL)",
    ),
    # A release may leave the trained system prompt out; a request has its `safety_identifier` or `user`.
    3: (
        "ALTER TABLE releases ADD COLUMN system_prompt BOOLEAN",
        "ALTER TABLE releases ADD COLUMN candidate_system_prompt BOOLEAN",
        "ALTER TABLE requests ADD COLUMN end_user TEXT",
    ),
    # Refused requests count towards requests per minute.
    4: (
        "CREATE TABLE unmetered_requests (tenant_id INTEGER NOT NULL REFERENCES tenants (id), "
        "started DOUBLE PRECISION NOT NULL)",
        "CREATE INDEX unmetered_requests_by_time ON unmetered_requests (tenant_id, started)",
    ),
    # The result of the serving check is stored with a release, which may carry a constraint.
    5: (
        "ALTER TABLE releases ADD COLUMN serving JSON",
        "ALTER TABLE releases ADD COLUMN grammar TEXT",
        "ALTER TABLE releases ADD COLUMN candidate_grammar TEXT",
    ),
}
"""The statements that lead from each version to the next, for SQLite and PostgreSQL alike."""


def upgrade(database: Database, actor: str | None) -> None:
    """Migrate the tables to the present version, in one transaction with a line in the audit log."""
    with database.reading() as connection:
        if connection.execute(select(schema.c.version)).scalar_one() == SCHEMA_VERSION:
            return
    with changing(database, actor) as change:
        version = change.connection.execute(select(schema.c.version)).scalar_one()
        if version == SCHEMA_VERSION:
            return  # another process has migrated it meanwhile
        for step in range(version, SCHEMA_VERSION):
            for statement in _STATEMENTS[step]:
                change.connection.execute(text(statement))
        change.connection.execute(update(schema).values(version=SCHEMA_VERSION))
        change.log("schema.upgrade", "state", before=version, after=SCHEMA_VERSION)
