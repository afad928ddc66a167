"""adapters list, show, verify, sign and keys, as a user runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from making.command_line import tunewright
from making.small_adapters import PHRASE, create_key, own_keys
from making.terminal import Terminal
from tunewright.adapters.registry import WEIGHTS
from tunewright.data.versions import load_version

pytest_plugins = "making.adapter_projects"


@pytest.fixture(autouse=True)
def _keys_of_my_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_keys(tmp_path, monkeypatch)


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "project"))


def _name(project: Path) -> str:
    (adapter,) = (project / "adapters").iterdir()
    return adapter.name


def test_show_traces_an_adapter_to_its_rows_and_back(project: Path) -> None:
    name = _name(project)
    ran = tunewright("adapters", "show", "-p", project)
    assert ran.code == 0
    version = load_version(project / "dataset")
    train = version.examples("train")
    assert f"{name}, made " in ran.stdout
    assert f"dataset version {version.digest[:12]}: here, its rows as named" in ran.stdout
    assert f"train: {len(train)} rows, trained on" in ran.stdout

    lines = tunewright("adapters", "show", name[:8], "--rows", "-p", project).stdout.splitlines()
    rows = [tuple(line.split("\t")) for line in lines]
    assert rows == [
        (split, {"train": "trained"}.get(split, split), member.key)
        for split in ("train", "dev", "test")
        for member in version.examples(split)
    ]
    for split, use, key in (rows[0], rows[-1]):
        assert split in {"train", "test"}
        found = tunewright("data", "trained-by", key, "-p", project, "--json").document["adapters"]
        assert [(each["adapter"], each["use"]) for each in found] == [(name, use)]


def test_verify_reports_each_signature_state_with_its_exit_code(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verify() -> tuple[int, str]:
        ran = tunewright("adapters", "verify", "-p", project, "--json")
        (found,) = ran.document["adapters"]
        return ran.code, found["state"]

    assert verify() == (4, "unsigned")
    ann = create_key("ann")
    refused = tunewright("adapters", "sign", "-p", project)
    assert (refused.code, "tunewright keys trust" in refused.stderr) == (2, True)
    assert tunewright("keys", "trust", ann, "-p", project).code == 0
    ran = tunewright("adapters", "sign", "-p", project, "--json")
    assert ran.document == {"adapter": _name(project), "key": "ann", "signed_now": True}
    assert tunewright("adapters", "sign", "-p", project, "--json").document["signed_now"] is False
    assert verify() == (0, "signed")
    (project / "keys").rename(project / "aside")
    assert verify() == (4, "untrusted")
    (project / "aside").rename(project / "keys")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(project))
        assert verify() == (4, "not checked")
        refused = tunewright("adapters", "sign", "-p", project)
        assert (refused.code, "ssh-keygen is not installed" in refused.stderr) == (2, True)
    assert tunewright("keys", "revoke", "ann", "--because", "she left", "-p", project).code == 0
    assert verify() == (1, "revoked")
    weights = project / "adapters" / _name(project) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert verify() == (1, "tampered")
    assert tunewright("adapters", "sign", "-p", project).code == 2


@pytest.mark.slow
def test_deploy_refuses_an_unsigned_adapter_when_the_project_trusts_keys(project: Path) -> None:
    assert tunewright("keys", "trust", create_key("ann"), "-p", project).code == 0
    deploy = ("deploy", "colours", _name(project), "--force", "--because", "a try", "-p", project)
    ran = tunewright(*deploy)
    assert (ran.code, "The adapter is unsigned" in ran.stderr) == (2, True)
    assert tunewright("adapters", "sign", "-p", project).code == 0
    assert tunewright(*deploy).code == 0


@pytest.mark.slow
def test_sign_asks_for_the_passphrase_on_a_real_terminal(project: Path) -> None:
    assert tunewright("keys", "trust", create_key("ann", passphrase=PHRASE), "-p", project).code == 0
    terminal = Terminal("adapters", "sign", "-p", project)
    terminal.wait_for("Enter passphrase")
    terminal.type(PHRASE)
    assert terminal.code() == 0
    assert PHRASE not in terminal.screen
    assert tunewright("adapters", "verify", "-p", project).code == 0


# Keys


def test_keys_list_shows_owners_and_trust(project: Path, tmp_path: Path) -> None:
    assert "No key yet" in tunewright("keys", "list", "-p", project).stdout
    ann, bob = create_key("ann"), create_key("bob").rename(tmp_path / "bob.pub")
    trusted = tunewright("keys", "trust", ann, "--name", "ann-laptop", "-p", project, "--json").document
    assert (trusted["name"], trusted["id"][:7], trusted["revoked"]) == ("ann-laptop", "SHA256:", None)
    assert tunewright("keys", "trust", bob, "-p", project).code == 0
    found = tunewright("keys", "list", "-p", project, "--json").document["keys"]
    assert [(key["name"], key["own"], key["trusted"]["name"]) for key in found] == [
        ("ann-laptop", True, "ann-laptop"),
        ("bob", False, "bob"),
    ]
    assert found[0]["trusted"] == trusted
    assert tunewright("keys", "trust", ann, "-p", project).code == 2
    assert tunewright("keys", "trust", "nobody", "-p", project).code == 2
    assert tunewright("keys", "revoke", "ann-laptop", "--because", " ", "-p", project).code == 2
    assert tunewright("keys", "revoke", "ann-laptop", "--because", "lost", "-p", project).code == 0
    assert "lost" in tunewright("keys", "list", "-p", project).stdout
