"""Tenants and their keys."""

from __future__ import annotations

import hashlib
import re
import stat
import string
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError
from states import Clock, raw, reservation, with_tenant

from making.property_examples import examples
from tunewright.core.errors import UserError
from tunewright.data.pii import find
from tunewright.serving.tenants import State
from tunewright.serving.tenants.database import StateUnavailableError
from tunewright.serving.tenants.feedback import FeedbackValues
from tunewright.serving.tenants.quota import Limits
from tunewright.serving.tenants.shadow_reviews import SettledUnit, ShadowTrial
from tunewright.serving.tenants.tables import SCHEMA_VERSION
from tunewright.serving.tenants.tenants import InvalidKeyError


def test_key_may_use_its_tenants_aliases_including_later_ones(state: State) -> None:
    state.tenants.add("acme", ["courts"])
    key, reported = state.keys.create("acme")
    assert state.keys.caller(key).aliases == {"courts"}
    state.tenants.grant("acme", ["recipes"])
    assert state.keys.caller(key).aliases == {"courts", "recipes"}
    state.tenants.revoke("acme", ["courts"])
    assert state.keys.caller(key).aliases == {"recipes"}
    assert reported.prefix in key


def test_scoped_key_may_use_only_aliases_its_tenant_has(state: State) -> None:
    state.tenants.add("acme", ["courts", "recipes"])
    key, _ = state.keys.create("acme", aliases=["courts"])
    assert state.keys.caller(key).aliases == {"courts"}
    state.tenants.revoke("acme", ["courts"])
    assert state.keys.caller(key).aliases == set()
    with pytest.raises(UserError, match="may not call courts"):
        state.keys.create("acme", aliases=["courts"])


def test_stored_key_data_cannot_authenticate(tmp_path: Path) -> None:
    file = tmp_path / "serving" / "state.sqlite"
    with State(f"sqlite:///{file}") as state:
        state.tenants.add("acme")
        key, reported = state.keys.create("acme")
        kept = b"".join(path.read_bytes() for path in file.parent.iterdir())
        secret = key.removeprefix(reported.prefix + "_")[:43]
        assert secret.encode() not in kept
        sha256 = hashlib.sha256(key.encode()).hexdigest()
        assert sha256.encode() in kept
        for known in (reported.prefix, sha256, f"{reported.prefix}_{sha256[:43]}", secret):
            with pytest.raises(InvalidKeyError):
                state.keys.caller(known)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (file.parent / ".gitignore").read_text() == "*\n"


def test_keys_differ_and_hold_256_random_bits(state: State) -> None:
    state.tenants.add("acme")
    keys = [state.keys.create("acme") for _ in range(20)]
    assert len({key for key, _ in keys}) == 20
    # 43 characters of 6 bits, and the checksum.
    assert all(len(key) == len(reported.prefix) + 1 + 43 + 6 for key, reported in keys)


NO_KEY = "tw_0000000000_" + "A" * 43


@pytest.mark.parametrize("wrong", ["", "tw_", "x", NO_KEY, "tw_0000000000_" + "\N{SNOWMAN}" * 49, NO_KEY + "0UYFdx"])
def test_broken_key_is_refused_without_the_database(state_url: str, wrong: str) -> None:
    with State(state_url) as state, raw(state_url) as execute:
        execute("ALTER TABLE api_keys RENAME TO elsewhere")
    with State(state_url) as state:
        with pytest.raises(InvalidKeyError, match="Invalid API key: its checksum is wrong"):
            state.keys.caller(wrong)
        with pytest.raises(StateUnavailableError):
            state.keys.caller(NO_KEY + "0UYFdY")


@examples(200)
@given(place=st.integers(0, 62), character=st.sampled_from(string.ascii_letters + string.digits + "_-"))
def test_key_with_a_mistyped_character_is_broken(key: tuple[State, str], place: int, character: str) -> None:
    state, whole = key
    mistyped = whole[:place] + character + whole[place + 1 :]
    for broken in (mistyped, whole[:place], whole[:place] + whole[place + 1 :]):
        if broken != whole:
            with pytest.raises(InvalidKeyError, match="checksum"):
                state.keys.caller(broken)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[State, str]]:
    with State(f"sqlite:///{tmp_path_factory.mktemp('key')}/state.sqlite") as state:
        state.tenants.add("acme")
        made, _ = state.keys.create("acme")
        assert state.keys.caller(made).tenant == "acme"
        yield state, made


def test_documented_pattern_and_checksum_recognise_a_key(key: tuple[State, str]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "tenants.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import re\n.*?)```", page, re.DOTALL)
    scanner: dict[str, Any] = {}
    exec(code, scanner)
    _, whole = key
    text = f"API_KEY={whole}, and {whole.swapcase()}, tw_{whole[3:].swapcase()}, {NO_KEY}"
    assert scanner["keys_in"](text) == [whole]
    assert [(found.kind, text[found.start : found.end]) for found in find(text)] == [("tunewright_key", whole)]


def test_key_is_refused_when_expired_or_revoked(state_url: str) -> None:
    clock = Clock()
    with State(state_url, clock=clock) as state:
        state.tenants.add("acme")
        short, _ = state.keys.create("acme", lifetime=60)
        long, reported = state.keys.create("acme")
        clock.now += 59.9
        state.keys.caller(short)
        clock.now += 0.1
        with pytest.raises(InvalidKeyError, match="expired"):
            state.keys.caller(short)
        state.keys.caller(long)
        state.keys.revoke(reported.prefix)
        with pytest.raises(InvalidKeyError, match="revoked"):
            state.keys.caller(long)
        with pytest.raises(UserError, match="already revoked"):
            state.keys.revoke(reported.prefix)
        assert state.tenants.list()[0].keys == 0


def test_disable_removes_keys_and_aliases_of_one_tenant_only(state: State) -> None:
    for name, aliases in (("globex", ["courts"]), ("acme", ["courts", "recipes"])):
        state.tenants.add(name, aliases)
    state.keys.create("globex")
    keys = [state.keys.create("acme")[0] for _ in range(2)]
    state.keys.revoke(state.keys.list("acme")[0].prefix)
    before = len(state.audit.lines())
    ended = state.tenants.disable("acme")
    assert (ended.aliases, ended.keys) == ((), 0)
    for key in keys:
        with pytest.raises(InvalidKeyError):
            state.keys.caller(key)
    assert [line.action for line in state.audit.lines()[before:]] == ["key.revoke", "tenant.revoke"]
    assert not state.verify().faults
    assert state.tenants.get("globex").aliases == ("courts",)
    assert state.tenants.get("globex").keys == 1
    with pytest.raises(UserError, match="no keys and no aliases"):
        state.tenants.disable("acme")


def test_rotated_key_stays_valid_during_the_overlap(state_url: str) -> None:
    clock = Clock()
    with State(state_url, clock=clock) as state:
        state.tenants.add("acme", ["courts", "recipes"])
        old, reported = state.keys.create("acme", aliases=["courts"])
        new, replaces = state.keys.rotate(reported.prefix, overlap=3600)
        assert replaces.aliases == ("courts",)
        clock.now += 3599
        assert state.keys.caller(old).aliases == state.keys.caller(new).aliases == {"courts"}
        clock.now += 1
        with pytest.raises(InvalidKeyError, match="expired"):
            state.keys.caller(old)
        state.keys.caller(new)
        first = next(key for key in state.keys.list("acme") if key.prefix == reported.prefix)
        assert first.replaced_by == replaces.prefix
        with pytest.raises(UserError, match="is expired"):
            state.keys.rotate(reported.prefix, overlap=0)


def test_rotation_never_extends_the_old_key(state_url: str) -> None:
    clock = Clock()
    with State(state_url, clock=clock) as state:
        state.tenants.add("acme")
        _, reported = state.keys.create("acme", lifetime=10)
        state.keys.rotate(reported.prefix, overlap=3600)
        (old, _new) = state.keys.list("acme")
        assert old.expires == clock.now + 10


def test_invalid_changes_are_refused_and_change_nothing(state: State) -> None:
    state.tenants.add("acme")
    lines = len(state.audit.lines())
    for message, mistake in (
        ("The tenant acme already exists", lambda: state.tenants.add("acme")),
        ("Invalid name 'Acme Inc' for a tenant", lambda: state.tenants.add("Acme Inc")),
        ("Invalid name '../x' for an alias", lambda: state.tenants.add("globex", ["../x"])),
        (
            "requests_per_minute must be at least 1 \\(got 0\\)",
            lambda: state.tenants.add("globex", (), Limits(requests_per_minute=0)),
        ),
        ("Tenants: acme", lambda: state.tenants.limit("globex", Limits())),
        ("No key has the prefix", lambda: state.keys.revoke("tw_0")),
        ("may not call courts", lambda: state.tenants.revoke("acme", ["courts"])),
    ):
        with pytest.raises(UserError, match=message):
            mistake()
    assert [tenant.name for tenant in state.tenants.list()] == ["acme"]
    assert len(state.audit.lines()) == lines


@pytest.mark.parametrize("version", [5, SCHEMA_VERSION + 1])
def test_state_of_another_schema_is_refused(state_url: str, version: int) -> None:
    State(state_url).close()
    with raw(state_url) as execute:
        execute(f"UPDATE tunewright_schema SET version = {version}")
    with pytest.raises(UserError, match=f"schema {version}, and this tunewright supports schema {SCHEMA_VERSION}"):
        State(state_url)


@pytest.mark.parametrize("version", [6, 7, 8, 9])
def test_state_of_an_earlier_schema_is_upgraded_and_keeps_its_requests(
    version: int, state_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with State(state_url) as state:
        caller, release = with_tenant(state)
        state.quota.reserve(reservation(caller, release), "g")
        before = state.usage.lines()
    with raw(state_url) as execute:
        if version == 9:
            execute("ALTER TABLE shadow_judgements ADD COLUMN cost DOUBLE PRECISION DEFAULT 0 NOT NULL")
            execute("ALTER TABLE shadow_reviews DROP COLUMN spent")
            execute("INSERT INTO shadow_reviews VALUES (1, 0.02, 300, NULL)")
            for swapped, cost in ((False, 0.25), (True, 0.5)):
                values = {"swapped": swapped, "cost": cost}
                execute("INSERT INTO shadow_judgements VALUES (1, 1, :swapped, 'both', :cost)", **values)
        else:
            execute("DROP TABLE shadow_judgements")
        if version == 8:
            execute("ALTER TABLE shadow_reviews DROP COLUMN spent")
            execute("ALTER TABLE shadow_reviews DROP COLUMN judge")
            for column in ("labels", "confirmed", "squares"):
                execute(f"ALTER TABLE shadow_units DROP COLUMN {column}")
            execute("INSERT INTO shadow_reviews VALUES (1, 0.02, 300)")
            execute("INSERT INTO shadow_units VALUES (1, 0, 1, NULL, 3, 2, 0.5)")
        elif version < 8:
            for table in ("shadow_verdicts", "shadow_units", "shadow_reviews", "request_records", "recordings"):
                execute(f"DROP TABLE {table}")
            execute("ALTER TABLE releases DROP COLUMN shadow")
        if version == 6:
            execute("DROP TABLE feedback")
            execute("DROP INDEX requests_by_response_id")
            execute("ALTER TABLE requests DROP COLUMN response_id")
        execute("UPDATE tunewright_schema SET version = :version", version=version)
    with State(state_url) as state:
        assert state.usage.lines() == before
        if version == 8:
            trial = ShadowTrial(1, "courts", 1, "b", "b", "a", 0.02, 300, None)
            assert state.shadow_reviews.settled(trial) == [SettledUnit(0.5, 3, 2, 1, None, 2, 0.0, 0.0)]
            assert state.shadow_reviews.judgements(trial) == []
        if version > 7:
            with raw(state_url) as execute:
                (spent,) = execute("SELECT spent FROM shadow_reviews").scalars()
            assert spent == (0.75 if version == 9 else 0)
        named = replace(reservation(caller, release), response_id="chatcmpl-1")
        state.quota.reserve(named, "g")
        up = FeedbackValues("up", None, None, None)
        assert state.feedback.record(caller.tenant_id, "chatcmpl-1", up) == "recorded"
        with pytest.raises(IntegrityError):
            state.quota.reserve(named, "g")
    State(state_url).close()
    assert [record.message for record in caplog.records] == [
        f"the serving state was upgraded to schema {SCHEMA_VERSION}; earlier builds refuse it"
    ]


def test_database_with_foreign_tables_is_refused_and_unchanged(state_url: str) -> None:
    if state_url.startswith("sqlite"):
        Path(state_url.removeprefix("sqlite:///")).parent.mkdir()
    with raw(state_url) as execute:
        execute("CREATE TABLE tenants (theirs INTEGER)")
    with pytest.raises(UserError, match="other tables with the names tenants"):
        State(state_url)
    with raw(state_url) as execute:
        assert execute("SELECT * FROM tenants").keys() == ["theirs"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://root@localhost/x", "Unsupported database"),
        ("nonsense", "Invalid database URL"),
        ("sqlite://", "Unsupported database"),
        ("postgresql://me:secret@127.0.0.1:1/x", "is unavailable"),
    ],
)
def test_unreachable_state_is_reported_without_its_password(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        State(url)
    assert "secret" not in str(caught.value)


def test_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.sqlite").write_text("what I had for lunch, " * 100)
    with pytest.raises(UserError, match="file is not a database"):
        State(f"sqlite:///{tmp_path}/state.sqlite")


def test_key_has_the_time_of_its_last_use(state_url: str) -> None:
    from states import reservation

    clock = Clock()
    with State(state_url, clock=clock) as state:
        caller, release = with_tenant(state)
        assert [key.last_used for key in state.keys.list()] == [None]
        state.quota.reserve(reservation(caller, release), "g")
        assert [key.last_used for key in state.keys.list()] == [clock.now]


def test_callers_are_the_tenants_with_a_valid_key_and_their_aliases(state: State) -> None:
    for name, aliases in (("acme", ["courts", "recipes"]), ("globex", []), ("initech", ["courts"])):
        state.tenants.add(name, aliases)
        state.keys.create(name)
    state.tenants.add("keyless", ["courts"])
    state.keys.create("acme", lifetime=60)
    assert state.tenants.callers() == {"acme": {"courts", "recipes"}, "globex": set(), "initech": {"courts"}}
    state.tenants.disable("acme")
    (key,) = state.keys.list("initech")
    state.keys.revoke(key.prefix)
    assert state.tenants.callers() == {"globex": set()}
