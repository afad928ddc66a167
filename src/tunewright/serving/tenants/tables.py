"""The tables of the serving state. Times are seconds since 1970 by the database's clock; digests have 64 hex digits.

tenants --< tenant_aliases        the aliases that a tenant may call
   |---< api_keys                 hashes; a key may have fewer aliases than its tenant
   |---< requests >--- releases   a row for each request: its reservation, then its usage
   |                 |---- feedback   the tenant's opinion of the answer
   |                 '---- request_records   its text and the answer's, encrypted
   |---- recordings               the contract under which a tenant's requests are recorded
   |---< unmetered_requests       the other requests of the last minute: refused ones, and lists of models
   '---< usage_days               daily totals of deleted requests
releases                          alias to adapter digest; rows are added, never changed
audit, audit_head                 changes and their authors, chained by digests
gateways                          the running servers, which share limits and releases
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)
from sqlalchemy import Text as LongText

SCHEMA_VERSION = 10

NAME = String(63)
DIGEST = String(64)

metadata = MetaData()

schema = Table("tunewright_schema", metadata, Column("version", Integer, nullable=False))

tenants = Table(
    "tenants",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", NAME, nullable=False, unique=True),
    Column("created", Double, nullable=False),
    # Null: no limit.
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrency", BigInteger),
)

tenant_aliases = Table(
    "tenant_aliases",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), primary_key=True),
    Column("alias", NAME, primary_key=True),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("prefix", String(32), nullable=False, unique=True),
    Column("sha256", DIGEST, nullable=False),
    Column("aliases", JSON(none_as_null=True)),  # null: all of its tenant's
    Column("created", Double, nullable=False),
    Column("expires", Double),
    Column("revoked", Double),
    Column("replaced_by", String(32)),  # prefix of the key that replaces it
)

releases = Table(
    "releases",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("alias", NAME, nullable=False),
    Column("number", Integer, nullable=False),  # within the alias, from 1
    Column("action", String(16), nullable=False),
    # The adapter of the alias from this row on.
    Column("adapter", LongText),
    Column("digest", DIGEST),
    # The candidate, if there is one: on a share of the traffic, or (share null) in the shadow.
    Column("candidate", LongText),
    Column("candidate_digest", DIGEST),
    Column("share", Double),
    Column("restores", Integer),  # for a rollback: the number of the restored release
    Column("verdict", String(16)),
    Column("evaluation", LongText),
    Column("because", LongText),  # the reason for a release without a verdict to ship
    Column("isolation", JSON(none_as_null=True)),  # the isolation test that it passed
    Column("untested", LongText),  # the reason for a release without that test
    Column("author", LongText),
    Column("created", Double, nullable=False),
    # False: the trained system prompt is not added to requests without one.
    Column("system_prompt", Boolean),
    Column("candidate_system_prompt", Boolean),
    Column("serving", JSON(none_as_null=True)),  # the serving check of the adapter
    # The rule that answers match if their request sets no form; null: any text.
    Column("grammar", LongText),
    Column("candidate_grammar", LongText),
    Column("shadow", JSON(none_as_null=True)),  # what the review of its shadow showed
    UniqueConstraint("alias", "number"),
)

requests = Table(
    "requests",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("key_id", ForeignKey("api_keys.id"), nullable=False),
    Column("alias", NAME, nullable=False),
    Column("release_id", ForeignKey("releases.id"), nullable=False),
    Column("digest", DIGEST, nullable=False),
    Column("gateway", String(32), nullable=False),
    Column("started", Double, nullable=False),
    # The reservation while the request is in progress; the usage once it is finished.
    Column("tokens", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger),
    Column("completion_tokens", BigInteger),
    Column("queued_s", Double),
    Column("first_token_s", Double),
    Column("total_s", Double),
    Column("outcome", String(16)),
    Column("finished", Double),
    Column("end_user", LongText),  # the tenant's label for its user
    # With its prefix, such as chatcmpl-. Null before schema 7, and of a forgotten request: what still arrives for it,
    # its record, its shadow's answer or feedback, finds no request and is dropped.
    Column("response_id", String(64)),
    # For the limits: a tenant's requests of the last minute, and its unfinished ones.
    Index("requests_by_time", "tenant_id", "started"),
)
Index(
    "requests_under_way",
    requests.c.tenant_id,
    sqlite_where=requests.c.finished.is_(None),
    postgresql_where=requests.c.finished.is_(None),
)
requests_by_response_id = Index("requests_by_response_id", requests.c.response_id, unique=True)

# These requests have no usage and only count towards requests per minute.
unmetered_requests = Table(
    "unmetered_requests",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("started", Double, nullable=False),
    Index("unmetered_requests_by_time", "tenant_id", "started"),
)

# Records that remain after the roll-up: daily totals, and the last use of each key.
usage_days = Table(
    "usage_days",
    metadata,
    Column("day", Integer, primary_key=True, autoincrement=False),  # since 1970, UTC
    Column("tenant_id", ForeignKey("tenants.id"), primary_key=True),
    Column("alias", NAME, primary_key=True),
    Column("digest", DIGEST, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("first_tokens", BigInteger, nullable=False),  # the number of requests with a first token
    Column("first_token_s", Double, nullable=False),
)

key_uses = Table(
    "key_uses",
    metadata,
    Column("key_id", ForeignKey("api_keys.id"), primary_key=True),
    Column("last_used", Double, nullable=False),
)

shadow_answers = Table(
    "shadow_answers",
    metadata,
    Column("request_id", ForeignKey("requests.id"), primary_key=True),
    Column("release_id", ForeignKey("releases.id"), nullable=False),
    Column("answer", LongText),
    Column("shadow_answer", LongText),
    Column("why_not", LongText),  # why the shadow has no answer
)

# Terms of a shadow's review, declared before the first look.
shadow_reviews = Table(
    "shadow_reviews",
    metadata,
    Column("release_id", ForeignKey("releases.id"), primary_key=True, autoincrement=False),
    Column("margin", Double, nullable=False),
    Column("most_units", Integer, nullable=False),
    Column("judge", JSON(none_as_null=True)),  # the model that takes part, and the share that people judge
    Column("spent", Double, nullable=False, default=0.0),  # on the judge's replies; deleted requests' count as well
)

shadow_verdicts = Table(
    "shadow_verdicts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("release_id", ForeignKey("releases.id"), nullable=False),
    Column("request_id", ForeignKey("requests.id", ondelete="CASCADE"), nullable=False),
    Column("reviewer", LongText, nullable=False),
    Column("verdict", String(8)),  # live, shadow, both, neither or skip; null withdraws the reviewer's last one
    Column("time", Double, nullable=False),
    Index("shadow_verdicts_by_request", "request_id"),
)

# A judge's replies about a pair in both orders. Their text is not stored: it may repeat what a request says.
shadow_judgements = Table(
    "shadow_judgements",
    metadata,
    Column("release_id", ForeignKey("releases.id"), primary_key=True),
    Column("request_id", ForeignKey("requests.id", ondelete="CASCADE"), primary_key=True),
    Column("swapped", Boolean, primary_key=True),  # true: the candidate's answer was shown second
    Column("verdict", String(8)),  # live, shadow or both; null: the reply had none
)

# The units of a shadow's sequence. Numbers only: they stay when a unit's requests are deleted.
shadow_units = Table(
    "shadow_units",
    metadata,
    Column("release_id", ForeignKey("releases.id"), primary_key=True),
    Column("place", Integer, primary_key=True, autoincrement=False),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("unit", DIGEST),  # null: it was forgotten
    Column("requests", Integer, nullable=False),
    Column("differing", Integer, nullable=False),
    Column("value", Double, nullable=False),  # mean difference, candidate minus live
    Column("labels", Integer, nullable=False),  # differing answers that people judged
    # Sums from which the weight of the judge follows for later units.
    Column("confirmed", Double, nullable=False),
    Column("squares", Double, nullable=False),
)

feedback = Table(
    "feedback",
    metadata,
    # Feedback that arrives while its request is deleted goes with it.
    Column("request_id", ForeignKey("requests.id", ondelete="CASCADE"), primary_key=True),
    Column("time", Double, nullable=False),
    Column("thumb", String(4)),  # up or down
    Column("score", Double),  # from 0 to 1
    # Texts without secrets and personal data, which placeholders replace.
    Column("correction", LongText),
    Column("reason", LongText),
)

recordings = Table(
    "recordings",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), primary_key=True),
    Column("contract", LongText, nullable=False),
    Column("days", Integer, nullable=False),  # of retention
    Column("share", Double, nullable=False),  # of the units, above 0 and at most 1
    Column("started", Double, nullable=False),
    Column("stopped", Double),
    Column("key_id", String(16), nullable=False),  # of the key file; it reveals nothing about the key
    Column("dropped", BigInteger, nullable=False),  # requests that could not be recorded
)

request_records = Table(
    "request_records",
    metadata,
    Column("request_id", ForeignKey("requests.id", ondelete="CASCADE"), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    # Keyed digests: of the end user, of the conversation's beginning or of the request; and of the end user.
    Column("unit", DIGEST, nullable=False),
    Column("unit_kind", String(12), nullable=False),
    Column("subject", DIGEST),
    Column("probability", Double, nullable=False),  # with which its unit was sampled
    Column("expires", Double, nullable=False),
    Column("body", LargeBinary, nullable=False),  # encrypted JSON, without secrets and personal data
    Index("request_records_by_tenant", "tenant_id"),
    Index("request_records_by_expiry", "expires"),
)

gateways = Table(
    "gateways",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", LongText, nullable=False),
    Column("seen", Double, nullable=False),
    Column("release_id", Integer),  # the newest release that it has taken
)

audit = Table(
    "audit",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("time", String(32), nullable=False),
    Column("actor", LongText),
    Column("action", String(32), nullable=False),
    Column("subject", LongText, nullable=False),
    Column("details", LongText, nullable=False),  # canonical JSON
    Column("previous", String(64), nullable=False),
    Column("digest", DIGEST, nullable=False),
)

audit_head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("number", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
)
