"""Signatures over every file and the inputs' digests, by trusted and other keys."""

from __future__ import annotations

import base64
import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from adapter_helpers import create_key, lora_weights, own_keys, write_adapter
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.manifest import LOCAL, MANIFEST, SIGNATURE
from tunewright.adapters.private_keys import PrivateKey, private_key, private_keys
from tunewright.adapters.registry import CONFIG, LINEAGE, WEIGHTS, Adapter, store_adapter
from tunewright.adapters.signing import PAYLOAD_TYPE, sign, signing_key, store_signer
from tunewright.adapters.trust import require_trusted, trust_status
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_json
from tunewright.core.progress import LogReporter


@pytest.fixture(autouse=True)
def keys_of_my_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_keys(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def first_key(tmp_path_factory: pytest.TempPathFactory) -> PrivateKey:
    """One key for all tests: encrypting takes a sixth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        own_keys(tmp_path_factory.mktemp("keys"), patch)
        return create_key("ann")


@pytest.fixture
def ann(first_key: PrivateKey, keys_of_my_own: Path) -> PrivateKey:
    keys_of_my_own.mkdir(parents=True, mode=0o700)
    return replace(first_key, path=Path(shutil.copy2(first_key.path, keys_of_my_own)))


def _trusting(tmp_path: Path, *keys: PrivateKey) -> TrustedKeys:
    trusted = TrustedKeys(tmp_path / "project" / "keys")
    for key in keys:
        trusted.trust(key.name, key.public_key, "ann")
    return trusted


def _store(tmp_path: Path, signer: PrivateKey | None, seed: int = 0, inputs: str = "inputs") -> Adapter:
    weights = write_adapter(tmp_path / "run" / str(seed), weights=lora_weights(seed=seed))
    lineage = {
        "created": "2026-01-01T00:00:00+00:00",
        "inputs_digest": digest(inputs),
        "base": {"digest": digest("base")},
        "template_digest": digest("template"),
        "dataset": {"digest": digest("dataset")},
    }
    place = tmp_path / "project" / "adapters"
    history = [{"step": 1, "loss": 2.5}]
    return store_adapter(place, "courts", weights, {"step-5": weights}, lineage, history, servable=True, signer=signer)


def test_signed_adapter_names_its_signer(tmp_path: Path, ann: PrivateKey) -> None:
    adapter = _store(tmp_path, ann)
    found = trust_status(adapter, _trusting(tmp_path, ann))
    assert (found.state, found.keys, found.reasons) == ("signed", ("ann",), ("signed by ann",))


def test_signature_is_verified_by_another_dsse_implementation(tmp_path: Path, ann: PrivateKey) -> None:
    """securesystemslib is what TUF and in-toto sign with."""
    adapter = _store(tmp_path, ann)
    detached = json.loads((adapter.folder / SIGNATURE).read_text())
    payload = (adapter.folder / MANIFEST).read_bytes()
    key = SSlibKey.from_crypto(load_pem_public_key(ann.public_key.encode()), keyid=ann.id)
    envelope = Envelope.from_dict({**json.loads(json.dumps(detached)), "payload": base64.b64encode(payload).decode()})
    assert envelope.payload_type == PAYLOAD_TYPE
    assert list(envelope.verify([key], 1)) == [ann.id]
    other = payload.replace(b"courts", b"forums")
    forged = Envelope.from_dict({**json.loads(json.dumps(detached)), "payload": base64.b64encode(other).decode()})
    with pytest.raises(VerificationError):
        forged.verify([key], 1)


def _flip(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[-1] ^= 1
        (folder / file).write_bytes(data)

    return change


def _reason(folder: Path) -> None:
    lineage = json.loads((folder / LINEAGE).read_text())
    write_json(folder / LINEAGE, {**lineage, "dataset": {"digest": digest("another dataset")}})


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")


def _link(folder: Path) -> None:
    (folder / "metrics.jsonl").rename(folder.parent / "elsewhere")
    (folder / "metrics.jsonl").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_flip(WEIGHTS), f"{WEIGHTS} has changed"),
        (_flip(CONFIG), f"{CONFIG} has changed"),
        (_flip(f"checkpoints/step-5/{WEIGHTS}"), f"checkpoints/step-5/{WEIGHTS} has changed"),
        (_flip("metrics.jsonl"), "metrics.jsonl has changed"),
        (_flip(MANIFEST), "Not strict JSON"),
        (_reason, f"{LINEAGE} has changed"),
        (_pickle, "adapter_model.bin is not in the manifest"),
        (_link, "may have only plain files"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
        (lambda folder: (folder / LINEAGE).unlink(), "The lineage cannot be read"),
    ],
)
def test_verification_names_any_change_after_signing(
    change: Callable[[Path], None], words: str, tmp_path: Path, ann: PrivateKey
) -> None:
    adapter = _store(tmp_path, ann)
    change(adapter.folder)
    found = trust_status(Adapter(adapter.folder), _trusting(tmp_path, ann))
    assert found.state == "tampered"
    assert any(words in reason for reason in found.reasons), found.reasons
    with pytest.raises(UserError, match="The adapter is tampered"):
        require_trusted(Adapter(adapter.folder), TrustedKeys(tmp_path / "no-keys"))


def test_rewritten_manifest_invalidates_the_signature(tmp_path: Path, ann: PrivateKey) -> None:
    from tunewright.adapters.registry import write_manifest

    adapter = _store(tmp_path, ann)
    _reason(adapter.folder)
    write_manifest(adapter.folder, adapter.name)
    found = trust_status(Adapter(adapter.folder), _trusting(tmp_path, ann))
    assert (found.state, found.reasons) == ("tampered", ("the signature of ann is of another manifest",))


def test_signature_is_invalid_for_another_name(tmp_path: Path, ann: PrivateKey) -> None:
    adapter = _store(tmp_path, ann)
    renamed = adapter.folder.rename(adapter.folder.with_name(adapter.name.replace("courts", "forums")))
    found = trust_status(Adapter(renamed), _trusting(tmp_path, ann))
    assert found.state == "tampered"
    assert f"the manifest names {adapter.name}" in found.reasons


def test_signature_is_invalid_for_another_adapter(tmp_path: Path, ann: PrivateKey) -> None:
    one, two = _store(tmp_path, ann), _store(tmp_path, None, seed=1)
    (two.folder / SIGNATURE).write_bytes((one.folder / SIGNATURE).read_bytes())
    assert trust_status(two, _trusting(tmp_path, ann)).state == "tampered"


def test_unsigned_untrusted_and_revoked_are_distinguished(tmp_path: Path, ann: PrivateKey) -> None:
    bob = create_key("bob")
    unsigned, by_bob, by_ann = (_store(tmp_path, key, seed=n) for n, key in enumerate([None, bob, ann]))
    trusted = _trusting(tmp_path, ann)
    assert trust_status(unsigned, trusted).state == "unsigned"
    assert trust_status(by_bob, trusted).state == "untrusted"
    assert trust_status(by_bob, trusted).keys == (bob.id[:16],)
    trusted.revoke("ann", "the laptop was stolen", "bob")
    found = trust_status(by_ann, TrustedKeys(trusted.folder))
    assert found.state == "revoked"
    assert "the laptop was stolen" in found.reasons[0]


def test_require_trusted_needs_a_signature_only_with_trusted_keys(tmp_path: Path, ann: PrivateKey) -> None:
    unsigned, signed = _store(tmp_path, None), _store(tmp_path, ann, seed=1)
    none = TrustedKeys(tmp_path / "no-keys")
    require_trusted(unsigned, none)
    require_trusted(signed, none)
    trusted = _trusting(tmp_path, ann)
    require_trusted(signed, trusted)
    with pytest.raises(
        UserError, match="The adapter is unsigned: no signature, and this project requires a trusted signature"
    ):
        require_trusted(unsigned, trusted)
    assert sign(unsigned.folder, ann)
    require_trusted(unsigned, trusted)
    assert not sign(unsigned.folder, ann)


def test_adapter_is_trusted_with_one_trusted_signature_of_two(tmp_path: Path, ann: PrivateKey) -> None:
    adapter = _store(tmp_path, create_key("bob"))
    sign(adapter.folder, ann)
    found = trust_status(adapter, _trusting(tmp_path, ann))
    assert (found.state, len(found.keys)) == ("signed", 2)


def test_signature_survives_retraining_to_the_same_adapter(tmp_path: Path, ann: PrivateKey) -> None:
    adapter = _store(tmp_path, ann)
    again = _store(tmp_path, None, inputs="other inputs")
    assert again == adapter
    assert again.was_trained_by(digest("inputs"))
    assert again.was_trained_by(digest("other inputs"))
    assert (adapter.folder / LOCAL).exists()
    assert trust_status(again, _trusting(tmp_path, ann)).state == "signed"


def test_adapter_without_manifest_is_unsigned_and_its_change_is_detected(tmp_path: Path) -> None:
    adapter = _store(tmp_path, None)
    (adapter.folder / MANIFEST).unlink()
    assert trust_status(adapter, _trusting(tmp_path)).state == "unsigned"
    _flip(CONFIG)(adapter.folder)
    assert trust_status(adapter, _trusting(tmp_path)).state == "tampered"


# Keys


def test_private_key_is_owner_only_and_outside_the_project(tmp_path: Path) -> None:
    ann = create_key("ann")
    assert stat.S_IMODE(ann.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(ann.path.parent.stat().st_mode) == 0o700
    assert (tmp_path / "project") not in ann.path.parents
    assert [key.name for key in private_keys()] == ["ann"]
    assert len(list(ann.path.parent.iterdir())) == 1


def test_private_key_readable_by_others_is_refused(tmp_path: Path, ann: PrivateKey) -> None:
    ann.path.chmod(0o640)
    with pytest.raises(UserError, match=r"Other users can read this private key \(mode 640\)"):
        private_key("ann").unlock(LogReporter())


def test_key_is_never_overwritten(ann: PrivateKey) -> None:
    before = ann.path.read_bytes()
    with pytest.raises(UserError, match="You have a key 'ann' already"):
        create_key("ann")
    assert ann.path.read_bytes() == before


@pytest.mark.parametrize("name", ["", "Ann", "../ann", "a" * 64, "änn", ".ann", "ann/bob", "ann\n"])
def test_key_name_cannot_be_a_path(name: str) -> None:
    with pytest.raises(UserError, match="Invalid name"):
        create_key(name)


def test_revoked_key_cannot_be_trusted_again(tmp_path: Path, ann: PrivateKey) -> None:
    trusted = _trusting(tmp_path, ann)
    trusted.revoke("ann", "lost", None)
    with pytest.raises(UserError, match="This key was revoked on"):
        TrustedKeys(trusted.folder).trust("ann-again", ann.public_key, None)
    with pytest.raises(UserError, match="The key was revoked on"):
        TrustedKeys(trusted.folder).revoke("ann", "lost", None)


def test_trust_accepts_only_public_ed25519_keys(tmp_path: Path, ann: PrivateKey) -> None:
    trusted = TrustedKeys(tmp_path / "keys")
    with pytest.raises(UserError, match="this is the private half"):
        trusted.trust("ann", ann.path.read_text(), None)
    other = ec.generate_private_key(ec.SECP256R1())
    public = other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(UserError, match="Not an Ed25519 key"):
        trusted.trust("other", public, None)
    with pytest.raises(UserError, match="Not a public key"):
        trusted.trust("other", "nothing of the kind", None)
    path = ann.path.with_name("other.pem")
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(UserError, match="Not an Ed25519 key"):
        private_key("other").unlock(LogReporter())
    assert not trusted.folder.exists()


def test_changed_trusted_key_file_is_refused(tmp_path: Path, ann: PrivateKey) -> None:
    trusted = _trusting(tmp_path, ann)
    path = trusted.folder / "ann.json"
    whole = path.read_text()
    path.write_text(whole.replace(ann.id, "0" * 64))
    with pytest.raises(UserError, match="The file's name or ID does not match its key"):
        TrustedKeys(trusted.folder)
    path.write_text(whole.replace('"name"', '"id": "", "name"'))
    with pytest.raises(UserError, match='duplicate key "id"'):
        TrustedKeys(trusted.folder)


class _Heard:
    """Records messages."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_store_signer_reports_the_key_or_the_reason(tmp_path: Path) -> None:
    keys, heard = tmp_path / "project" / "keys", _Heard()
    assert store_signer(keys, heard) is None  # type: ignore[arg-type]
    assert heard.said == []  # without keys signing is not in use
    ann = create_key("ann")
    assert store_signer(keys, heard) is None  # type: ignore[arg-type]
    assert "This project trusts none of your keys (ann)" in heard.said[-1]
    trusted = _trusting(tmp_path, ann)
    assert store_signer(keys, heard) == ann  # type: ignore[arg-type]
    assert heard.said[-1] == "The adapter will be signed with your key ann."
    bob = create_key("bob")
    trusted.trust("bob", bob.public_key, None)
    assert store_signer(keys, heard) is None  # type: ignore[arg-type]
    assert "Several of your keys could sign (ann, bob)" in heard.said[-1]
    assert signing_key(TrustedKeys(keys), "bob") == bob
    with pytest.raises(UserError, match="You have no key 'eve'"):
        signing_key(TrustedKeys(keys), "eve")
