"""The files of trusted and revoked keys, as people and git see them."""

from __future__ import annotations

import base64
import tarfile
from pathlib import Path

import pytest

from making.small_adapters import create_key, own_keys, ssh_keygen
from tunewright.adapters.keys import TrustedKeys
from tunewright.core.errors import UserError


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_keys(tmp_path, monkeypatch)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    return tmp_path / "project" / "keys"


def test_trust_writes_a_line_that_is_for_adapters_only(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEWRIGHT_AUTHOR", "Ann: the first")
    public = create_key("ann")
    made = TrustedKeys(keys).trust(public, "ann@example.com")
    kind, key, _ = public.read_text().split()
    (line,) = (keys / "allowed_signers").read_text().splitlines()
    assert line.startswith(f'ann@example.com namespaces="tunewright-adapter@1" {kind} {key} trusted on 20')
    assert line.endswith(" by Ann: the first")
    (read,) = TrustedKeys(keys).all
    assert (read.name, read.id, read.public_key, read.trusted.at) == (
        made.name,
        made.id,
        made.public_key,
        made.trusted.at,
    )
    assert made.id.startswith("SHA256:")


def test_lines_by_hand_are_read(keys: Path) -> None:
    ann, bob = (create_key(name).read_text().split() for name in ("ann", "bob"))
    keys.mkdir(parents=True)
    (keys / "allowed_signers").write_text(
        f'# the team\n\nann,annie@example.com valid-before="20990101",namespaces="a,b c" {ann[0]}  {ann[1]}\n'
        f"\t*@example.com {bob[0]} {bob[1]} bob's laptop\r\n"
    )
    (keys / "revoked_keys").write_text(f"# lost\n{bob[0]} {bob[1]}\n")
    one, two = TrustedKeys(keys).all
    assert (one.name, one.options, one.revoked) == ("ann", 'valid-before="20990101",namespaces="a,b c"', None)
    assert (two.name, two.options, two.trusted.because) == ("*@example.com", "", "bob's laptop")
    assert two.revoked is not None
    assert TrustedKeys(keys).revoke("ann", "lost").revoked is not None
    assert len((keys / "revoked_keys").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "name", ["", "../ann", "a" * 64, "änn", ".ann", "ann/bob", "ann\n", "ann bob", "a,b", "*", '"']
)
def test_key_name_is_one_word(name: str, keys: Path) -> None:
    with pytest.raises(UserError, match="Invalid name"):
        TrustedKeys(keys).trust(create_key("ann"), name)
    assert not keys.exists()


def test_key_and_name_are_trusted_once(keys: Path) -> None:
    ann, bob = create_key("ann"), create_key("bob")
    TrustedKeys(keys).trust(ann)
    with pytest.raises(UserError, match="The project trusts this key already, as ann"):
        TrustedKeys(keys).trust(ann, "ann-again")
    with pytest.raises(UserError, match="Another key is named ann"):
        TrustedKeys(keys).trust(bob, "ann")


def test_revoked_key_cannot_be_trusted_again(keys: Path) -> None:
    ann = create_key("ann")
    TrustedKeys(keys).trust(ann)
    TrustedKeys(keys).revoke("ann", "lost\nor stolen")
    assert (keys / "revoked_keys").read_text().endswith(": lost or stolen\n")
    with pytest.raises(UserError, match=r"This key was revoked on 20.*: lost or stolen"):
        TrustedKeys(keys).trust(ann, "ann-again")
    with pytest.raises(UserError, match="The key was revoked on 20"):
        TrustedKeys(keys).revoke("ann", "lost")
    (keys / "allowed_signers").unlink()
    with pytest.raises(UserError, match="This key was revoked on 20"):
        TrustedKeys(keys).trust(ann)


def test_revoke_needs_a_known_key_and_a_reason(keys: Path) -> None:
    with pytest.raises(UserError, match="The project trusts no key 'ann'"):
        TrustedKeys(keys).revoke("ann", "lost")
    TrustedKeys(keys).trust(create_key("ann"))
    with pytest.raises(UserError, match="The reason must not be empty"):
        TrustedKeys(keys).revoke("ann", " ")


def test_krl_is_left_to_ssh_keygen(keys: Path) -> None:
    ann = create_key("ann")
    TrustedKeys(keys).trust(ann)
    ssh_keygen("-k", "-f", keys / "revoked_keys")
    krl = (keys / "revoked_keys").read_bytes()
    with pytest.raises(UserError, match="The project revokes keys by a KRL") as refused:
        TrustedKeys(keys).revoke("ann", "lost")
    assert "ssh-keygen -k -u -f" in str(refused.value.fix)
    assert (keys / "revoked_keys").read_bytes() == krl


def test_trust_accepts_one_public_key_only(tmp_path: Path, keys: Path) -> None:
    ann = create_key("ann")
    refused = tmp_path / "refused.pub"

    def problem(content: str | bytes) -> str:
        refused.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError) as error:
            TrustedKeys(keys).trust(refused, "ann")
        return error.value.what

    with pytest.raises(UserError, match="this is the private half"):
        TrustedKeys(keys).trust(ann.with_suffix(""), "ann")
    with pytest.raises(UserError, match="No such file"):
        TrustedKeys(keys).trust("ann")
    whole = ann.read_text()
    not_one = "Not one public key in OpenSSH's format"
    assert problem("nothing of the kind") == not_one
    assert problem(b"\xff\xfe") == not_one
    assert problem(whole * 2) == not_one
    assert problem("-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n") == not_one
    assert problem(whole.replace("ssh-ed25519", "ssh-rsa")) == "The public key does not match its type"
    assert not keys.exists()


@pytest.mark.parametrize(
    "line", ["ann", "ann ssh-ed25519", "ann ssh-ed25519 AAAA", "ann nothing AAAA", 'ann " ssh-rsa AAAA']
)
@pytest.mark.parametrize("name", ["allowed_signers", "revoked_keys"])
def test_damaged_line_is_named(name: str, line: str, keys: Path) -> None:
    keys.mkdir(parents=True)
    (keys / name).write_text(f"# the team\n{line}\n")
    with pytest.raises(UserError) as refused:
        TrustedKeys(keys)
    assert refused.value.where == f"{keys / name}:2"


def test_files_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    with tarfile.open(Path(__file__).parents[1] / "golden" / "signed-adapters.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    keys = tmp_path / "keys"
    ann, bob = TrustedKeys(keys).all
    assert (ann.name, ann.id[:12], ann.revoked, ann.trusted.by) == ("ann", "b258fc91beed", None, "Ann")
    assert bob.revoked is not None
    assert bob.revoked.because == "the laptop was stolen"
    assert TrustedKeys(keys).allowed_signers.count("\n") == 1, "without bob"
    path = keys / "ann.json"
    whole = path.read_text()
    path.write_text(whole.replace(ann.id, "0" * 64))
    with pytest.raises(UserError, match="The file's name or ID does not match its key"):
        TrustedKeys(keys)
    line = f"ssh-ed25519 {base64.b64encode(bytes(51)).decode()} eve"
    path.write_text(whole.replace("-----BEGIN", f"{line}\\n-----BEGIN", 1))
    with pytest.raises(UserError, match="The file's name or ID does not match its key"):
        TrustedKeys(keys)  # the text before the block would be a line of allowed_signers
    path.write_text(whole.replace('"name"', '"id": "", "name"'))
    with pytest.raises(UserError, match='duplicate key "id"'):
        TrustedKeys(keys)
