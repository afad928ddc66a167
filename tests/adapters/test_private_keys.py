"""Private keys encrypted with a passphrase from a terminal, a variable or a file."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_public_key,
)

from adapter_helpers import PHRASE, create_key, own_keys
from command_line import tiny_project, tunewright
from terminal import Terminal
from tunewright.adapters.private_keys import NEW_PASSPHRASE, PASSPHRASE, PrivateKey, private_key
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter

OTHER = "staple battery horse"


@pytest.fixture(autouse=True)
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_keys(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def first_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One key for all tests: encrypting takes a sixth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        own_keys(tmp_path_factory.mktemp("keys"), patch)
        return create_key("ann").path


@pytest.fixture
def ann(first_key: Path, keys: Path) -> PrivateKey:
    keys.mkdir(parents=True)
    return PrivateKey(Path(shutil.copy2(first_key, keys)))


class _Person(LogReporter):
    """Answers prompts for passphrases."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.prompts: list[str] = []

    def secret(self, prompt: str) -> str | None:
        self.prompts.append(prompt)
        return self.answers.pop(0) if self.answers else None


def _written(keys: Path, format_: PrivateFormat, encryption: KeySerializationEncryption) -> Path:
    keys.mkdir(parents=True, exist_ok=True)
    path = keys / "ann.pem"
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, format_, encryption))
    path.chmod(0o600)
    return path


def _signs(key: PrivateKey, reporter: LogReporter | None = None) -> bool:
    signature = key.unlock(reporter or LogReporter()).sign(b"message")
    public = load_pem_public_key(key.public_key.encode())
    public.verify(signature, b"message")  # type: ignore[union-attr, call-arg]
    return True


def test_key_signs_with_its_passphrase_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made = create_key("ann")
    assert private_key("ann").id == made.id
    assert _signs(private_key("ann"))
    monkeypatch.setenv(PASSPHRASE, OTHER)
    with pytest.raises(UserError, match="Wrong passphrase for your key 'ann'") as refused:
        private_key("ann").unlock(LogReporter())
    assert str(refused.value.fix).startswith(f"Correct {PASSPHRASE} ")


def test_key_file_holds_neither_secret_nor_passphrase_in_clear_text() -> None:
    made = create_key("ann")
    secret = made._decrypted.private_bytes_raw()  # type: ignore[union-attr]
    text = made.path.read_bytes()
    body = base64.b64decode(b"".join(text.splitlines()[1:-1]))
    assert secret not in body
    assert PHRASE.encode() not in body + text
    assert b"aes256" in body
    assert b"bcrypt" in body


def test_ssh_keygen_reads_the_key_with_its_passphrase_only(ann: PrivateKey) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    read = ["ssh-keygen", "-y", "-f", str(ann.path), "-P"]
    shown = subprocess.run([*read, PHRASE], capture_output=True, text=True, check=True).stdout
    public = ann._public[0]
    from cryptography.hazmat.primitives.serialization import PublicFormat

    assert shown.split()[:2] == public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode().split()
    assert subprocess.run([*read, OTHER], capture_output=True, check=False).returncode != 0


def test_passphrase_comes_from_a_file_without_its_line_end(
    tmp_path: Path, ann: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "phrase"
    monkeypatch.setenv(f"{PASSPHRASE}_FILE", str(file))
    with pytest.raises(UserError, match="mutually exclusive"):
        private_key("ann").unlock(LogReporter())
    monkeypatch.delenv(PASSPHRASE)
    with pytest.raises(UserError, match="The passphrase cannot be read: No such file"):
        private_key("ann").unlock(LogReporter())
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="The passphrase cannot be read: not UTF-8"):
        private_key("ann").unlock(LogReporter())
    file.write_text("\n")
    with pytest.raises(UserError, match="The passphrase is empty"):
        private_key("ann").unlock(LogReporter())
    file.write_bytes(f"{PHRASE}\r\n".encode())
    assert _signs(private_key("ann"))


def test_unlock_asks_three_times_on_a_terminal(ann: PrivateKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSPHRASE)
    person = _Person(OTHER, "", PHRASE)
    assert _signs(private_key("ann"), person)
    assert person.prompts == ["Passphrase of your key ann: "] * 3
    with pytest.raises(UserError, match="Wrong passphrase for your key 'ann', 3 times"):
        private_key("ann").unlock(_Person(OTHER, OTHER, OTHER, PHRASE))


def test_unlock_names_the_variable_without_a_terminal(ann: PrivateKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSPHRASE)
    with pytest.raises(UserError, match="there is no terminal to ask for it") as refused:
        private_key("ann").unlock(LogReporter())
    assert f"{PASSPHRASE}_FILE" in str(refused.value.fix)


def test_new_key_asks_twice_and_refuses_short_or_different_passphrases(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunewright.adapters.private_keys import new_private_key

    monkeypatch.delenv(PASSPHRASE)
    with pytest.raises(UserError, match=r"must have at least 12 characters \(got 5\)"):
        new_private_key("ann", _Person("short"))
    with pytest.raises(UserError, match="The two passphrases differ"):
        new_private_key("ann", _Person(PHRASE, OTHER))
    with pytest.raises(UserError, match="there is no terminal"):
        new_private_key("ann", LogReporter())
    assert not keys.exists() or not list(keys.iterdir())
    new_private_key("ann", _Person(PHRASE, PHRASE))
    assert _signs(private_key("ann"), _Person(PHRASE))


@pytest.mark.parametrize("format_", [PrivateFormat.PKCS8, PrivateFormat.OpenSSH])
def test_unencrypted_key_is_listed_but_signs_only_once_encrypted(
    format_: PrivateFormat, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _written(keys, format_, NoEncryption())
    before = private_key("ann")
    assert not before.is_encrypted
    with pytest.raises(UserError, match="Your key 'ann' is not encrypted") as refused:
        before.unlock(LogReporter())
    assert str(refused.value.fix).endswith("tunewright keys passphrase ann")
    (tmp_path / "tunewright.yaml").write_text("name: tiny\n")
    (listed,) = tunewright("keys", "list", "-p", tmp_path, "--json").document["keys"]
    assert (listed["own"], listed["encrypted"]) == (True, False)
    assert "yes, not encrypted" in tunewright("keys", "list", "-p", tmp_path).stdout
    monkeypatch.setenv(NEW_PASSPHRASE, PHRASE)
    assert tunewright("keys", "passphrase", "ann", "-p", tmp_path).code == 0
    after = private_key("ann")
    assert (after.id, after.is_encrypted, path.stat().st_mode & 0o777) == (before.id, True, 0o600)
    assert _signs(after)
    assert list(keys.iterdir()) == [path]


def test_changed_passphrase_replaces_the_old_one(ann: PrivateKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NEW_PASSPHRASE, "short")
    before = ann.path.read_bytes()
    with pytest.raises(UserError, match="at least 12 characters"):
        private_key("ann").change_passphrase(LogReporter())
    assert ann.path.read_bytes() == before
    monkeypatch.setenv(NEW_PASSPHRASE, OTHER)
    private_key("ann").change_passphrase(LogReporter())
    with pytest.raises(UserError, match="Wrong passphrase"):
        private_key("ann").unlock(LogReporter())
    monkeypatch.setenv(PASSPHRASE, OTHER)
    assert _signs(private_key("ann"))
    assert private_key("ann").id == ann.id


def test_key_in_another_encryption_is_refused(keys: Path) -> None:
    _written(keys, PrivateFormat.PKCS8, BestAvailableEncryption(PHRASE.encode()))
    with pytest.raises(UserError, match="Not a private key: Password was not given"):
        private_key("ann").unlock(LogReporter())


def test_replaced_public_half_is_noticed(ann: PrivateKey) -> None:
    bob = create_key("bob")

    def body(key: PrivateKey) -> bytes:
        return base64.b64decode(b"".join(key.path.read_bytes().splitlines()[1:-1]))

    own, foreign = (key._public[0].public_bytes_raw() for key in (ann, bob))
    forged = base64.b64encode(body(ann).replace(own, foreign))
    ann.path.write_bytes(b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + forged + b"\n-----END OPENSSH PRIVATE KEY-----\n")
    assert private_key("ann").id == bob.id
    with pytest.raises(UserError, match=r"Not a private key|different keys"):
        private_key("ann").unlock(LogReporter())


def test_any_cut_or_changed_file_is_one_user_error(ann: PrivateKey) -> None:
    whole = ann.path.read_bytes()
    body = base64.b64decode(b"".join(whole.splitlines()[1:-1]))
    for at in range(0, len(body), 3):
        for damaged in (body[:at], body[:at] + bytes([body[at] ^ 255]) + body[at + 1 :]):
            text = base64.b64encode(damaged)
            ann.path.write_bytes(
                b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + text + b"\n-----END OPENSSH PRIVATE KEY-----\n"
            )
            try:
                assert private_key("ann").id
            except UserError as error:
                assert error.where == str(ann.path)


@pytest.mark.slow
def test_create_and_passphrase_ask_on_a_real_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSPHRASE)
    terminal = Terminal("keys", "create", "ann", "-p", tmp_path)
    terminal.wait_for("New passphrase (at least 12 characters): ")
    terminal.type(PHRASE)
    terminal.wait_for("The same passphrase again: ")
    terminal.type(PHRASE)
    terminal.wait_for("New key ann")
    assert terminal.code() == 0
    assert PHRASE not in terminal.screen
    assert _signs(private_key("ann"), _Person(PHRASE))


def test_run_asks_for_the_passphrase_before_it_measures(
    tmp_path: Path, ann: PrivateKey, monkeypatch: pytest.MonkeyPatch, tiny_base_folder: Path
) -> None:
    project = tiny_project(tmp_path / "project", tiny_base_folder)
    assert tunewright("keys", "trust", ann.name, "-p", project).code == 0
    monkeypatch.setenv(PASSPHRASE, OTHER)
    ended = tunewright("run", "-p", project)
    assert ended.code == 2
    assert "Wrong passphrase for your key 'ann'" in ended.stderr
    assert "prompting arms" not in ended.stderr
