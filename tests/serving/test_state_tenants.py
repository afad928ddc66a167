"""Tenants and their keys."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
from states import Clock, raw, with_tenant

from tunewright.core.errors import UserError
from tunewright.serving.state import InvalidKeyError, Limits, State
from tunewright.serving.state.tables import SCHEMA_VERSION


def test_a_key_opens_its_tenants_aliases_those_of_later_on_too(state_url: str) -> None:
    with State(state_url) as state:
        state.tenants.add("acme", ["courts"])
        key, told = state.tenants.add_key("acme")
        assert state.tenants.caller(key).aliases == {"courts"}
        state.tenants.allow("acme", ["recipes"])
        assert state.tenants.caller(key).aliases == {"courts", "recipes"}
        state.tenants.allow("acme", ["courts"], allowed=False)
        assert state.tenants.caller(key).aliases == {"recipes"}
        assert told.prefix in key


def test_a_key_of_a_narrower_scope_opens_no_more_than_its_tenant_may_call(state_url: str) -> None:
    with State(state_url) as state:
        state.tenants.add("acme", ["courts", "recipes"])
        key, _ = state.tenants.add_key("acme", aliases=["courts"])
        assert state.tenants.caller(key).aliases == {"courts"}
        state.tenants.allow("acme", ["courts"], allowed=False)
        assert state.tenants.caller(key).aliases == set()
        with pytest.raises(UserError, match="may not call courts"):
            state.tenants.add_key("acme", aliases=["courts"])


def test_nothing_that_is_kept_opens_the_door(tmp_path: Path) -> None:
    file = tmp_path / "serving" / "state.sqlite"
    with State(f"sqlite:///{file}") as state:
        state.tenants.add("acme")
        key, told = state.tenants.add_key("acme")
        kept = b"".join(path.read_bytes() for path in file.parent.iterdir())
        secret = key.removeprefix(told.prefix + "_")
        assert secret.encode() not in kept
        sha256 = hashlib.sha256(key.encode()).hexdigest()
        assert sha256.encode() in kept
        for known in (told.prefix, sha256, f"{told.prefix}_{sha256[:43]}", secret):
            with pytest.raises(InvalidKeyError):
                state.tenants.caller(known)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (file.parent / ".gitignore").read_text() == "*\n"


def test_keys_differ_and_hold_256_random_bits(state_url: str) -> None:
    with State(state_url) as state:
        state.tenants.add("acme")
        keys = [state.tenants.add_key("acme") for _ in range(20)]
        assert len({key for key, _ in keys}) == 20
        assert all(len(key) == len(told.prefix) + 1 + 43 for key, told in keys)  # 43 characters of 6 bits


@pytest.mark.parametrize("wrong", ["", "tw_", "x", "tw_0000000000_" + "A" * 43, "tw_0000000000_" + "\N{SNOWMAN}" * 43])
def test_what_is_no_key_opens_nothing(state_url: str, wrong: str) -> None:
    with State(state_url) as state:
        state.tenants.add("acme")
        with pytest.raises(InvalidKeyError, match="not known"):
            state.tenants.caller(wrong)


def test_a_key_ends_when_it_expires_or_is_revoked(state_url: str) -> None:
    clock = Clock()
    with State(state_url, clock=clock) as state:
        state.tenants.add("acme")
        short, _ = state.tenants.add_key("acme", lifetime=60)
        long, told = state.tenants.add_key("acme")
        clock.now += 59.9
        state.tenants.caller(short)
        clock.now += 0.1
        with pytest.raises(InvalidKeyError, match="expired"):
            state.tenants.caller(short)
        state.tenants.caller(long)
        state.tenants.revoke_key(told.prefix)
        with pytest.raises(InvalidKeyError, match="revoked"):
            state.tenants.caller(long)
        with pytest.raises(UserError, match="revoked already"):
            state.tenants.revoke_key(told.prefix)
        assert state.tenants.list()[0].keys == 0


def test_a_tenant_that_is_ended_has_no_key_and_no_alias_and_others_have_theirs(state_url: str) -> None:
    with State(state_url) as state:
        for name, aliases in (("globex", ["courts"]), ("acme", ["courts", "recipes"])):
            state.tenants.add(name, aliases)
        state.tenants.add_key("globex")
        keys = [state.tenants.add_key("acme")[0] for _ in range(2)]
        state.tenants.revoke_key(state.tenants.keys_of("acme")[0].prefix)
        before = len(state.audit.lines())
        ended = state.tenants.end("acme")
        assert (ended.aliases, ended.keys) == ((), 0)
        for key in keys:
            with pytest.raises(InvalidKeyError):
                state.tenants.caller(key)
        assert [line.action for line in state.audit.lines()[before:]] == ["key.revoke", "tenant.revoke"]
        assert not state.verify().faults
        assert state.tenants.get("globex").aliases == ("courts",)
        assert state.tenants.get("globex").keys == 1
        with pytest.raises(UserError, match="nothing to end"):
            state.tenants.end("acme")


def test_while_a_key_is_rotated_both_are_good(state_url: str) -> None:
    clock = Clock()
    with State(state_url, clock=clock) as state:
        state.tenants.add("acme", ["courts", "recipes"])
        old, told = state.tenants.add_key("acme", aliases=["courts"])
        new, replaces = state.tenants.rotate_key(told.prefix, overlap=3600)
        assert replaces.aliases == ("courts",)
        clock.now += 3599
        assert state.tenants.caller(old).aliases == state.tenants.caller(new).aliases == {"courts"}
        clock.now += 1
        with pytest.raises(InvalidKeyError, match="expired"):
            state.tenants.caller(old)
        state.tenants.caller(new)
        first = next(key for key in state.tenants.keys_of("acme") if key.prefix == told.prefix)
        assert first.replaced_by == replaces.prefix
        with pytest.raises(UserError, match="is expired"):
            state.tenants.rotate_key(told.prefix, overlap=0)


def test_rotation_never_lengthens_the_old_keys_life(state_url: str) -> None:
    clock = Clock()
    with State(state_url, clock=clock) as state:
        state.tenants.add("acme")
        _, told = state.tenants.add_key("acme", lifetime=10)
        state.tenants.rotate_key(told.prefix, overlap=3600)
        (old, _new) = state.tenants.keys_of("acme")
        assert old.expires == clock.now + 10


def test_mistakes_are_told_and_change_nothing(state_url: str) -> None:
    with State(state_url) as state:
        state.tenants.add("acme")
        lines = len(state.audit.lines())
        for message, mistake in (
            ("there is a tenant acme already", lambda: state.tenants.add("acme")),
            ("no name for a tenant", lambda: state.tenants.add("Acme Inc")),
            ("no name for an alias", lambda: state.tenants.add("globex", ["../x"])),
            ("a limit is at least 1", lambda: state.tenants.add("globex", (), Limits(requests_per_minute=0))),
            ("There are: acme", lambda: state.tenants.limit("globex", Limits())),
            ("no key begins with", lambda: state.tenants.revoke_key("tw_0")),
            ("may not call courts", lambda: state.tenants.allow("acme", ["courts"], allowed=False)),
        ):
            with pytest.raises(UserError, match=message):
                mistake()
        assert [tenant.name for tenant in state.tenants.list()] == ["acme"]
        assert len(state.audit.lines()) == lines


def test_a_state_of_a_newer_tunewright_is_refused(state_url: str) -> None:
    State(state_url).close()
    with raw(state_url) as execute:
        execute(f"UPDATE tunewright_schema SET version = {SCHEMA_VERSION + 1}")
    with pytest.raises(UserError, match=f"schema {SCHEMA_VERSION + 1}; this tunewright knows schema {SCHEMA_VERSION}"):
        State(state_url)


def test_a_database_of_somebody_else_is_left_alone(state_url: str) -> None:
    if state_url.startswith("sqlite"):
        Path(state_url.removeprefix("sqlite:///")).parent.mkdir()
    with raw(state_url) as execute:
        execute("CREATE TABLE tenants (theirs INTEGER)")
    with pytest.raises(UserError, match="other tables of the names tenants"):
        State(state_url)
    with raw(state_url) as execute:
        assert execute("SELECT * FROM tenants").keys() == ["theirs"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://root@localhost/x", "no database that the state can be in"),
        ("nonsense", "no database's URL"),
        ("sqlite://", "no database that the state can be in"),
        ("postgresql://me:secret@127.0.0.1:1/x", "does not answer"),
    ],
)
def test_a_state_that_cannot_be_reached_is_told_without_its_password(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        State(url)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "state.sqlite").write_text("what I had for lunch, " * 100)
    with pytest.raises(UserError, match="file is not a database"):
        State(f"sqlite:///{tmp_path}/state.sqlite")


def test_when_a_key_was_last_used_is_known(state_url: str) -> None:
    from states import wanted

    clock = Clock()
    with State(state_url, clock=clock) as state:
        caller, release = with_tenant(state)
        assert [key.last_used for key in state.tenants.keys_of()] == [None]
        state.meter.reserve(wanted(caller, release), "g")
        assert [key.last_used for key in state.tenants.keys_of()] == [clock.now]
