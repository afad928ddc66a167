"""Signatures over every file and the inputs' digests, made and verified by ssh-keygen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from making.command_line import tiny_project, tunewright
from making.small_adapters import PHRASE, create_key, lora_weights, own_keys, ssh_keygen, write_adapter
from tunewright.adapters.keys import NAMESPACE, TrustedKeys
from tunewright.adapters.manifest import DSSE, LOCAL, MANIFEST, SIGNATURE
from tunewright.adapters.registry import (
    CONFIG,
    LINEAGE,
    WEIGHTS,
    Adapter,
    require_trusted,
    store_adapter,
    trust_status,
    write_manifest,
)
from tunewright.adapters.signing import SIGNING_KEY, SigningKey, sign, signing_key, store_signer
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_json
from tunewright.core.progress import LogReporter

GOLDEN = Path(__file__).parents[1] / "golden" / "signed-adapters.tar.xz"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_keys(tmp_path, monkeypatch)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    return tmp_path / "project" / "keys"


@pytest.fixture
def ann(keys: Path) -> SigningKey:
    return _key("ann", keys)


def _key(name: str, keys: Path) -> SigningKey:
    """A new key that the project trusts."""
    TrustedKeys(keys).trust(create_key(name))
    return signing_key(TrustedKeys(keys), name)


def _stranger(name: str, folder: Path) -> SigningKey:
    """A new key that only another project trusts."""
    (folder / name).mkdir()
    return _key(name, folder / name / "keys")


def _store(tmp_path: Path, signer: SigningKey | None, seed: int = 0, inputs: str = "inputs") -> Adapter:
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


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _without_ssh_keygen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path.home()))


def test_ssh_keygen_verifies_the_signature_as_documented(tmp_path: Path, keys: Path, ann: SigningKey) -> None:
    adapter = _store(tmp_path, ann)
    command = f"ssh-keygen -Y verify -f {keys}/allowed_signers -I ann -n tunewright-adapter@1 -s manifest.json.sig"

    def verifies(manifest: bytes) -> bool:
        return subprocess.run(command.split(), cwd=adapter.folder, input=manifest, check=False).returncode == 0

    manifest = (adapter.folder / MANIFEST).read_bytes()
    assert verifies(manifest)
    assert not verifies(manifest + b" ")


def _flip(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[-1] ^= 1
        (folder / file).write_bytes(data)

    return change


def _change_lineage(folder: Path) -> None:
    lineage = json.loads((folder / LINEAGE).read_text())
    write_json(folder / LINEAGE, {**lineage, "dataset": {"digest": digest("another dataset")}})


def _add_pickle(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")


def _link(folder: Path) -> None:
    (folder / "metrics.jsonl").rename(folder.parent / "elsewhere")
    (folder / "metrics.jsonl").symlink_to(folder.parent / "elsewhere")


def _signatures(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / SIGNATURE).write_text(text)


BEGIN, END = "-----BEGIN SSH SIGNATURE-----\n", "-----END SSH SIGNATURE-----\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_flip(WEIGHTS), f"{WEIGHTS} has changed"),
        (_flip(CONFIG), f"{CONFIG} has changed"),
        (_flip(f"checkpoints/step-5/{WEIGHTS}"), f"checkpoints/step-5/{WEIGHTS} has changed"),
        (_flip("metrics.jsonl"), "metrics.jsonl has changed"),
        (_flip(MANIFEST), "Not strict JSON"),
        (_flip(SIGNATURE), "Expected only signatures of ssh-keygen"),
        (_signatures("nothing of the kind\n"), "Expected only signatures of ssh-keygen"),
        (_signatures((BEGIN + END) * 17), "at most 16"),
        (_signatures(f"{BEGIN}U1NIU0lHAAAAAQAA\n{END}"), "Not a signature of ssh-keygen"),
        (_signatures(f"{BEGIN}U1NIU0lHAAAAAf////8=\n{END}"), "Not a signature of ssh-keygen"),
        (_signatures(f"{BEGIN}AAA=A\n{END}"), "Not a signature of ssh-keygen"),
        (_change_lineage, f"{LINEAGE} has changed"),
        (_add_pickle, "adapter_model.bin is not in the manifest"),
        (_link, "may have only plain files"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
        (lambda folder: (folder / LINEAGE).unlink(), "The lineage cannot be read"),
    ],
)
def test_verification_names_any_change_after_signing(
    change: Callable[[Path], object], words: str, tmp_path: Path, keys: Path, ann: SigningKey
) -> None:
    adapter = _store(tmp_path, ann)
    change(adapter.folder)
    found = trust_status(Adapter(adapter.folder), TrustedKeys(keys))
    assert found.state == "tampered"
    assert any(words in reason for reason in found.reasons), found.reasons
    with pytest.raises(UserError, match="The adapter is tampered"):
        require_trusted(Adapter(adapter.folder), TrustedKeys(tmp_path / "no-keys"))


def test_signature_is_of_one_manifest_one_name_and_one_purpose(tmp_path: Path, keys: Path, ann: SigningKey) -> None:
    rewritten = _store(tmp_path, ann)
    copied, for_git = (_store(tmp_path, None, seed=seed) for seed in (1, 2))
    shutil.copy(rewritten.folder / SIGNATURE, copied.folder / SIGNATURE)
    ssh_keygen("-Y", "sign", "-n", "git", "-f", ann.file, for_git.folder / MANIFEST)
    for adapter in (copied, for_git):
        assert trust_status(adapter, TrustedKeys(keys)).state == "tampered"

    renamed = rewritten.folder.rename(rewritten.folder.with_name(rewritten.name.replace("courts", "forums")))
    assert f"the manifest names {rewritten.name}" in trust_status(Adapter(renamed), TrustedKeys(keys)).reasons
    renamed.rename(rewritten.folder)
    _change_lineage(rewritten.folder)
    write_manifest(rewritten.folder, rewritten.name)
    for folder, name in ((keys, "ann"), (tmp_path / "no-keys", ann.id)):
        found = trust_status(Adapter(rewritten.folder), TrustedKeys(folder))
        assert (found.state, found.reasons) == ("tampered", (f"the signature of {name} is of another manifest",))


def test_unsigned_untrusted_and_revoked_are_distinguished(tmp_path: Path, keys: Path, ann: SigningKey) -> None:
    bob = _stranger("bob", tmp_path)
    unsigned, by_bob, by_ann = (_store(tmp_path, key, seed=n) for n, key in enumerate([None, bob, ann]))
    trusted = TrustedKeys(keys)
    assert trust_status(unsigned, trusted).state == "unsigned"
    assert trust_status(by_bob, trusted).state == "untrusted"
    assert trust_status(by_bob, trusted).keys == (bob.id,)
    trusted.revoke("ann", "the laptop was stolen")
    found = trust_status(by_ann, TrustedKeys(keys))
    assert found.state == "revoked"
    assert found.reasons[0].startswith("ann was revoked on 20")
    assert found.reasons[0].endswith(": the laptop was stolen")
    assert trust_status(unsigned, TrustedKeys(keys)).state == "unsigned"
    with pytest.raises(UserError, match="this project requires a trusted signature"):
        require_trusted(unsigned, TrustedKeys(keys))  # revoking the last key does not end the requirement


def test_key_revoked_by_a_krl_does_not_count(tmp_path: Path, keys: Path, ann: SigningKey) -> None:
    adapter, by_bob = _store(tmp_path, ann), _store(tmp_path, _key("bob", keys), seed=1)
    ssh_keygen("-k", "-f", keys / "revoked_keys", ann.file)
    found = trust_status(adapter, TrustedKeys(keys))
    assert (found.state, found.reasons) == ("revoked", ("ann was revoked in revoked_keys",))
    with pytest.raises(UserError, match="The adapter is revoked"):
        require_trusted(adapter, TrustedKeys(keys))
    assert trust_status(by_bob, TrustedKeys(keys)).state == "signed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ('valid-before="20200101"', "allowed_signers:1: key has expired"),
        ('valid-after="20990101"', "allowed_signers:1: key is not yet valid"),
        ('namespaces="git"', "allowed_signers:1: key is not permitted for use in signature namespace"),
    ],
)
def test_key_counts_only_within_its_options(
    options: str, words: str, tmp_path: Path, keys: Path, ann: SigningKey
) -> None:
    adapter = _store(tmp_path, ann)
    _replace(keys / "allowed_signers", f'namespaces="{NAMESPACE}"', options)
    found = trust_status(adapter, TrustedKeys(keys))
    assert found.state == "untrusted"
    assert words in found.reasons[0]
    with pytest.raises(UserError, match="The adapter is untrusted"):
        require_trusted(adapter, TrustedKeys(keys))
    _replace(keys / "allowed_signers", options, 'valid-before="20990101"')
    assert trust_status(adapter, TrustedKeys(keys)).state == "signed"


def test_require_trusted_needs_a_signature_only_with_trusted_keys(tmp_path: Path, keys: Path) -> None:
    unsigned, none = _store(tmp_path, None), TrustedKeys(tmp_path / "no-keys")
    bob = _stranger("bob", tmp_path)
    signed = _store(tmp_path, bob, seed=1)
    require_trusted(unsigned, none)
    require_trusted(signed, none)
    ann = _key("ann", keys)
    trusted = TrustedKeys(keys)
    for adapter, state in ((unsigned, "unsigned: no signature"), (signed, "untrusted: signed by key SHA256:")):
        with pytest.raises(UserError, match=f"The adapter is {state}.*, and this project requires a trusted signature"):
            require_trusted(adapter, trusted)
        assert sign(adapter.folder, ann)
        require_trusted(adapter, trusted)
        assert not sign(adapter.folder, ann)
    # One trusted signature of two is enough.
    assert trust_status(signed, trusted).keys == (bob.id, "ann")


def test_signature_survives_retraining_to_the_same_adapter(tmp_path: Path, keys: Path, ann: SigningKey) -> None:
    adapter = _store(tmp_path, ann)
    again = _store(tmp_path, None, inputs="other inputs")
    assert again == adapter
    assert again.was_trained_by(digest("inputs"))
    assert again.was_trained_by(digest("other inputs"))
    assert (adapter.folder / LOCAL).exists()
    assert trust_status(again, TrustedKeys(keys)).state == "signed"


def test_adapter_without_manifest_is_unsigned_and_its_change_is_detected(tmp_path: Path, keys: Path) -> None:
    adapter = _store(tmp_path, None)
    (adapter.folder / MANIFEST).unlink()
    assert trust_status(adapter, TrustedKeys(keys)).state == "unsigned"
    _flip(CONFIG)(adapter.folder)
    assert trust_status(adapter, TrustedKeys(keys)).state == "tampered"


# Without ssh-keygen


def test_nothing_is_valid_without_ssh_keygen(
    tmp_path: Path, keys: Path, ann: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, unsigned = _store(tmp_path, ann), _store(tmp_path, None, seed=1)
    _without_ssh_keygen(monkeypatch)
    found = trust_status(adapter, TrustedKeys(keys))
    why = "the signature of ann is not checked: The program ssh-keygen is not installed"
    assert (found.state, found.reasons) == ("not checked", (why,))
    with pytest.raises(UserError, match=r"The adapter is not checked: .* requires a trusted signature"):
        require_trusted(adapter, TrustedKeys(keys))
    require_trusted(adapter, TrustedKeys(tmp_path / "no-keys"))
    with pytest.raises(UserError, match="ssh-keygen is not installed") as refused:
        sign(unsigned.folder, ann)
    assert "openssh-client" in str(refused.value.fix)
    _flip(WEIGHTS)(adapter.folder)
    assert trust_status(Adapter(adapter.folder), TrustedKeys(keys)).state == "tampered"


def test_ssh_keygen_without_signatures_is_named(
    tmp_path: Path, keys: Path, ann: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = _store(tmp_path, ann)
    old = tmp_path / "old"
    old.mkdir()
    (old / "ssh-keygen").write_text("#!/bin/sh\necho 'unknown option -- Y\nusage: ssh-keygen [-q]' >&2\nexit 1\n")
    (old / "ssh-keygen").chmod(0o755)
    monkeypatch.setenv("PATH", f"{old}:{os.environ['PATH']}")
    found = trust_status(adapter, TrustedKeys(keys))
    assert found.state == "not checked"
    assert "This ssh-keygen makes no signatures" in found.reasons[0]


# The key that signs


class _Heard(LogReporter):
    """Records messages."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_store_signer_reports_the_key_or_the_reason(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = _Heard()
    public = create_key("ann")
    assert store_signer(keys, heard) is None
    assert heard.said == []  # without trusted keys signing is not in use
    TrustedKeys(keys).trust(public)
    ann = store_signer(keys, heard)
    assert ann == SigningKey(public, "ann", TrustedKeys(keys).all[0].id)
    assert heard.said[-1] == "The adapter will be signed with your key ann."
    bob = TrustedKeys(keys).trust(create_key("bob"))
    assert store_signer(keys, heard) is None
    assert "Several of your keys could sign (ann, bob)" in heard.said[-1]
    assert signing_key(TrustedKeys(keys), "bob").id == bob.id
    monkeypatch.setenv(SIGNING_KEY, str(public))
    assert store_signer(keys, heard) == ann
    with pytest.raises(UserError, match="This project does not trust your key eve"):
        signing_key(TrustedKeys(keys), "eve")
    with pytest.raises(UserError, match="This project does not trust your key"):
        signing_key(TrustedKeys(keys), str(create_key("carol")))
    TrustedKeys(keys).revoke("ann", "lost")
    assert store_signer(keys, heard) is None
    assert "The adapter will not be signed: This project does not trust your key" in heard.said[-1]
    monkeypatch.delenv(SIGNING_KEY)
    TrustedKeys(keys).revoke("bob", "lost")
    assert store_signer(keys, heard) is None
    assert "The adapter will not be signed: This project trusts none of your keys" in heard.said[-1]
    _without_ssh_keygen(monkeypatch)
    assert store_signer(keys, heard) is None
    assert "The adapter will not be signed: The program ssh-keygen is not installed" in heard.said[-1]


def test_files_that_are_no_keys_do_not_hinder_signing(home: Path, keys: Path, ann: SigningKey) -> None:
    (home / "a-folder.pub").mkdir()
    (home / "dangling.pub").symlink_to(home / "nowhere")
    (home / "notes.pub").write_text("nothing of the kind\n")
    assert signing_key(TrustedKeys(keys)) == ann
    assert [key.own for key in TrustedKeys(keys).list()] == [True]


def test_private_key_readable_by_others_does_not_sign(keys: Path, ann: SigningKey) -> None:
    ann.file.with_suffix("").chmod(0o640)
    with pytest.raises(UserError, match="Your key ann cannot sign"):
        store_signer(keys, LogReporter())


@pytest.fixture
def locked(keys: Path) -> SigningKey:
    """A key with a passphrase, which the project trusts."""
    TrustedKeys(keys).trust(create_key("ann", passphrase=PHRASE))
    return signing_key(TrustedKeys(keys))


def test_key_with_a_passphrase_is_refused_before_training(keys: Path, locked: SigningKey) -> None:
    with pytest.raises(UserError, match="Your key ann cannot sign: incorrect passphrase") as refused:
        store_signer(keys, LogReporter())
    assert str(refused.value.fix).startswith("Load the key into ssh-agent (ssh-add)")


def test_passphrase_comes_from_a_program(
    tmp_path: Path, keys: Path, locked: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ask"
    program.write_text(f"#!/bin/sh\necho '{PHRASE}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("SSH_ASKPASS", str(program))
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    assert store_signer(keys, LogReporter()) == locked
    assert trust_status(_store(tmp_path, locked), TrustedKeys(keys)).state == "signed"


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if shutil.which("ssh-agent") is None or shutil.which("ssh-add") is None:
        pytest.skip("ssh-agent and ssh-add are not installed")
    started = subprocess.run(["ssh-agent", "-s"], capture_output=True, text=True, check=True).stdout
    variables = dict(line.partition(";")[0].split("=", 1) for line in started.splitlines() if "=" in line)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield
    subprocess.run(["ssh-agent", "-k"], env={**os.environ, **variables}, capture_output=True, check=True)


@pytest.mark.usefixtures("agent")
def test_agent_signs_for_a_public_key(tmp_path: Path, keys: Path, ann: SigningKey) -> None:
    private = ann.file.with_suffix("")
    subprocess.run(["ssh-add", "-q", str(private)], check=True)
    private.unlink()
    assert store_signer(keys, LogReporter()) == ann
    assert trust_status(_store(tmp_path, ann), TrustedKeys(keys)).state == "signed"


def test_keys_of_other_kinds_sign(tmp_path: Path, keys: Path) -> None:
    TrustedKeys(keys).trust(create_key("ann", kind="rsa"))
    adapter = _store(tmp_path, signing_key(TrustedKeys(keys)))
    assert trust_status(adapter, TrustedKeys(keys)).state == "signed"
    assert not sign(adapter.folder, signing_key(TrustedKeys(keys)))


def test_signer_with_a_certificate_counts_by_its_authority(tmp_path: Path, keys: Path) -> None:
    ca, ann = create_key("ca"), create_key("ann")
    ssh_keygen("-q", "-s", ca.with_suffix(""), "-I", "ann", "-n", "ann@example.com", ann)
    keys.mkdir(parents=True)
    (keys / "allowed_signers").write_text(f'*@example.com cert-authority,namespaces="{NAMESPACE}" {ca.read_text()}')
    adapter = _store(tmp_path, None)
    certificate = ann.with_name("ann-cert.pub")
    ssh_keygen("-Y", "sign", "-n", NAMESPACE, "-f", certificate, adapter.folder / MANIFEST)
    found = trust_status(adapter, TrustedKeys(keys))
    assert (found.state, found.keys) == ("signed", ("ann@example.com",))


def test_run_tries_the_key_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base_folder: Path
) -> None:
    project = tiny_project(tmp_path / "project", tiny_base_folder)
    assert tunewright("keys", "trust", create_key("ann", passphrase=PHRASE), "-p", project).code == 0
    ended = tunewright("run", "-p", project)
    assert ended.code == 2
    assert "Your key ann cannot sign" in ended.stderr
    assert "prompting arms" not in ended.stderr


# Signatures of an earlier version


@pytest.fixture
def former(tmp_path: Path) -> Path:
    """A project whose adapters are signed as before ssh-keygen: by ann and eve, by bob (revoked), and by eve."""
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path / "former", filter="data")
    return tmp_path / "former"


def _former(former: Path, name: str) -> Adapter:
    (folder,) = (former / "adapters").glob(f"{name}-*")
    return Adapter(folder)


def _states(former: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    trusted = TrustedKeys(former / "keys")
    found = {name: trust_status(_former(former, name), trusted) for name in ("by-ann-and-eve", "by-bob", "by-eve")}
    return {name: (each.state, each.keys) for name, each in found.items()}


EVE = "60e0f9133912cb88"


def test_signatures_of_an_earlier_version_still_verify(former: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {
        "by-ann-and-eve": ("signed", ("ann", EVE)),
        "by-bob": ("revoked", ("bob",)),
        "by-eve": ("untrusted", (EVE,)),
    }
    assert _states(former) == expected
    with monkeypatch.context() as without:
        _without_ssh_keygen(without)
        assert _states(former) == expected
    assert sign(_former(former, "by-eve").folder, _key("carol", former / "keys"))
    TrustedKeys(former / "keys").revoke("ann", "she left")
    assert _states(former) == expected | {
        "by-ann-and-eve": ("revoked", ("ann", EVE)),
        "by-eve": ("signed", ("carol", EVE)),
    }


def test_signature_of_an_earlier_version_is_of_one_manifest(former: Path) -> None:
    one, two = _former(former, "by-ann-and-eve"), _former(former, "by-eve")
    shutil.copy(one.folder / DSSE, two.folder / DSSE)
    assert trust_status(two, TrustedKeys(former / "keys")).state == "tampered"
    _flip(LINEAGE)(one.folder)
    assert trust_status(Adapter(one.folder), TrustedKeys(former / "keys")).state == "tampered"


def test_revoked_key_of_an_earlier_version_stays_revoked_when_it_is_allowed_by_hand(former: Path) -> None:
    keys = former / "keys"
    (bob,) = [key for key in TrustedKeys(keys).all if key.revoked is not None]
    (keys / "allowed_signers").write_text(f"bob {bob.public_key}\n")
    assert _states(former)["by-bob"][0] == "revoked"
    revoked = TrustedKeys(keys).revocation(bob.fingerprint)
    assert revoked is not None and revoked.because == "the laptop was stolen"


def test_key_that_an_earlier_version_created_still_signs(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = create_key("ann")
    created = tmp_path / "data-home" / "tunewright" / "keys" / "ann.pem"
    created.parent.mkdir(parents=True)
    public.with_suffix("").rename(created)
    TrustedKeys(keys).trust(public)
    public.unlink()
    key = signing_key(TrustedKeys(keys))
    assert key.file == created
    assert trust_status(_store(tmp_path, key), TrustedKeys(keys)).state == "signed"
