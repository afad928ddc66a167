"""Signatures over an adapter's manifest, made and verified by ``ssh-keygen``, as git does.

``manifest.json.sig`` has one block of OpenSSH's format (PROTOCOL.sshsig) for each signer. Agents, passphrases and keys
in hardware work because ``ssh-keygen`` uses them.

``signature.json`` has the signatures of earlier versions, verified until tunewright 2.0 and no
longer made: a DSSE envelope (github.com/secure-systems-lab/dsse, v1.0.2) without its payload, which
is the file ``manifest.json``. Its keys are in keys/NAME.json.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from tunewright.adapters.keys import (
    NAMESPACE,
    TrustedKeys,
    file_fingerprint,
    fingerprint,
    own_keys,
    require_ssh_keygen,
    ssh_keygen,
    user_path,
)
from tunewright.adapters.manifest import DSSE, MANIFEST, SIGNATURE, Digest, Record, parse_record
from tunewright.core.errors import UserError
from tunewright.core.io import write_text, writing
from tunewright.core.progress import Reporter

SIGNING_KEY: Final = "TUNEWRIGHT_SIGNING_KEY"
"""Names the file of the key that signs: a private key, or the public half of a key in ssh-agent."""

_MOST = 16
"""Limit of signatures on one adapter."""
_BLOCK = re.compile("-----BEGIN SSH SIGNATURE-----\n([A-Za-z0-9+/=\n]*)-----END SSH SIGNATURE-----\n")


@dataclass(frozen=True)
class Signed:
    """The status of one signature in a project."""

    key: str
    """The key's name in the project, or the first characters of its ID or its fingerprint if it is unknown there."""
    status: Literal["signed", "untrusted", "revoked", "tampered", "not checked"]
    why: str


@dataclass(frozen=True)
class SigningKey:
    """One of the user's keys that a project trusts."""

    file: Path
    name: str
    """The key's name in the project."""
    id: str
    """Its fingerprint."""

    def sign(self, message: bytes, *, prompt: bool) -> str:
        """Return the signature over a message; with ``prompt``, ``ssh-keygen`` may ask at the terminal."""
        ran = ssh_keygen("-Y", "sign", "-n", NAMESPACE, "-f", str(self.file), data=message, prompt=prompt)
        if ran.code == 0:
            return ran.stdout
        said = ran.stderr.replace("Signing data on standard input", "").split("\n")
        reason = next((line.strip().rpartition('": ')[2] for line in reversed(said) if line.strip()), "no reason given")
        fix = "Load the key into ssh-agent (ssh-add), or let SSH_ASKPASS name a program that prints its passphrase."
        raise UserError(f"Your key {self.name} cannot sign: {reason}", where=str(self.file), fix=fix)


def sign(folder: Path, key: SigningKey, *, prompt: bool = False) -> bool:
    """Add a signature over the manifest in ``folder``; return False if this key has signed it already."""
    blocks = read_signatures(folder)
    if any(_signer(block, folder) == key.id for block in blocks):
        return False
    if len(blocks) >= _MOST:
        raise UserError(f"The adapter has {_MOST} signatures, and no more are read", where=str(folder / SIGNATURE))
    made = key.sign((folder / MANIFEST).read_bytes(), prompt=prompt)
    write_text(folder / SIGNATURE, "".join((*blocks, made)))
    return True


def read_signatures(folder: Path) -> list[str]:
    """Return the signatures of ``ssh-keygen`` in an adapter's folder; empty if it has none."""
    path = folder / SIGNATURE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    blocks = [found[0] for found in _BLOCK.finditer(text)]
    if "".join(blocks) != text or len(blocks) > _MOST:
        raise UserError(f"Expected only signatures of ssh-keygen, at most {_MOST}", where=str(path))
    return blocks


def verify_signatures(folder: Path, trusted: TrustedKeys) -> list[Signed]:
    """Return the status of each signature over the manifest in ``folder``, for a project with these keys."""
    payload = (folder / MANIFEST).read_bytes()
    found = [_verify(block, _signer(block, folder), payload, trusted) for block in read_signatures(folder)]
    return [*found, *_verify_former(folder, payload, trusted)]


def _verify(block: str, mark: str, payload: bytes, trusted: TrustedKeys) -> Signed:
    known = trusted.find(mark)
    name = mark if known is None else known.name
    try:
        with writing(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as place:
            signature, allowed = Path(place, "signature"), Path(place, "allowed_signers")
            signature.write_text(block, encoding="utf-8")
            allowed.write_text(trusted.allowed_signers, encoding="utf-8")
            signed = ("-n", NAMESPACE, "-s", str(signature))
            if ssh_keygen("-Y", "check-novalidate", *signed, data=payload).code != 0:
                return Signed(name, "tampered", f"the signature of {name} is of another manifest")
            if (revoked := trusted.revocation(mark)) is not None:
                return Signed(name, "revoked", f"{name} was revoked{revoked}")
            ran = ssh_keygen("-Y", "find-principals", "-f", str(allowed), "-s", str(signature))
            for principal in ran.stdout.splitlines():
                verify = ("-Y", "verify", "-f", str(allowed), "-I", principal, *signed)
                revocations = ("-r", str(trusted.revocations)) if trusted.revocations.exists() else ()
                ran = ssh_keygen(*verify, *revocations, data=payload)
                if ran.code == 0:
                    return Signed(principal, "signed", f"signed by {principal}")
                if revocations and ssh_keygen(*verify, data=payload).code == 0:
                    return Signed(principal, "revoked", f"{principal} was revoked in {trusted.revocations.name}")
    except UserError as error:
        return Signed(name, "not checked", f"the signature of {name} is not checked: {error.what}")
    if known is None:
        return Signed(name, "untrusted", f"signed by key {name}, which is not trusted here")
    why = ran.stderr.partition("\n")[0].replace(str(allowed), allowed.name)
    return Signed(name, "untrusted", f"signed by {name}, whose key does not count: {why}")


def store_signer(keys: Path, reporter: Reporter) -> SigningKey | None:
    """Return the key that signs stored adapters by default; report it, or the reason for its absence.

    A key that asks for a passphrase is refused: nobody may be there at the end of a training.
    """
    trusted = TrustedKeys(keys)
    if not trusted.required:  # signing is not in use
        return None
    try:
        key = signing_key(trusted)
    except UserError as error:
        reporter.say(f"The adapter will not be signed: {error.what}. {error.fix}")
        return None
    # Its options may have expired, or a KRL revokes it: then the project would refuse the adapter.
    tried = _verify(key.sign(b"", prompt=False), key.id, b"", trusted)
    if tried.status != "signed":
        reporter.say(f"The adapter will not be signed: {tried.why}.")
        return None
    reporter.say(f"The adapter will be signed with your key {key.name}.")
    return key


def signing_key(trusted: TrustedKeys, wanted: str | None = None) -> SigningKey:
    """Return the key that signs in a project: the wanted one, or the user's only key that the project trusts.

    The wanted one is a file, or a key's name in the project (None: the environment's, if it states one).
    """
    require_ssh_keygen()
    wanted = wanted or os.environ.get(SIGNING_KEY) or None
    file = user_path(wanted or "")
    keys = [(file, file_fingerprint(file))] if file.is_file() else own_keys()
    usable: dict[str, SigningKey] = {}
    for path, mark in keys:
        key = trusted.find(mark)
        if key is not None and trusted.revocation(mark) is None and (file.is_file() or wanted in (None, key.name)):
            usable.setdefault(mark, SigningKey(path, key.name, mark))
    if len(usable) > 1:
        names = ", ".join(key.name for key in usable.values())
        fix = f"Choose one with --key or {SIGNING_KEY}."
        raise UserError(f"Several of your keys could sign ({names})", where="--key", fix=fix)
    if not usable:
        what = "trusts none of your keys" if wanted is None else f"does not trust your key {wanted}"
        fix = "Trust a key: tunewright keys trust ~/.ssh/id_ed25519.pub (`ssh-keygen -t ed25519` creates it)."
        raise UserError(f"This project {what}", where=str(trusted.folder), fix=fix)
    return next(iter(usable.values()))


def _signer(block: str, folder: Path) -> str:
    """Return the fingerprint of the key that a signature names: a claim until ``ssh-keygen`` has checked it."""
    try:
        blob = base64.b64decode(block.split("-----")[2])
    except binascii.Error:
        blob = b""
    # Magic, version, and the public key as a string of the SSH protocol.
    size = int.from_bytes(blob[10:14])
    if not blob.startswith(b"SSHSIG\0\0\0\1") or len(blob) < 14 + size:
        raise UserError("Not a signature of ssh-keygen", where=str(folder / SIGNATURE))
    return fingerprint(blob[14 : 14 + size])


class _Signature(Record):
    """One signer's key ID, and 64 bytes in base64."""

    keyid: Digest
    sig: Annotated[str, Field(max_length=100)]


class _Envelope(Record):
    """All signatures of an earlier version over one manifest, in the order in which they were made."""

    payloadType: Literal["application/vnd.tunewright.adapter+json"] = (  # noqa: N815 (DSSE spells it so)
        "application/vnd.tunewright.adapter+json"
    )
    signatures: Annotated[tuple[_Signature, ...], Field(min_length=1, max_length=16)]


def _verify_former(folder: Path, payload: bytes, trusted: TrustedKeys) -> Iterator[Signed]:
    """Yield the status of each signature that an earlier version made over the manifest ``payload``."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    path = folder / DSSE
    if not path.is_file():
        return
    envelope = parse_record(_Envelope, path.read_bytes(), str(path))
    kind = envelope.payloadType.encode()
    # DSSE signs the payload and its type, each with its length, so that they cannot be confused.
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    for signature in envelope.signatures:
        key = next((known for known in trusted.all if known.id == signature.keyid), None)
        mark = signature.keyid[:16]
        if key is None:
            yield Signed(mark, "untrusted", f"signed by key {mark}, which is not trusted here")
            continue
        name, blob = key.name, base64.b64decode(key.public_key.split()[1])
        try:
            public = Ed25519PublicKey.from_public_bytes(blob[-32:])  # keys/NAME.json has no other type
            public.verify(base64.b64decode(signature.sig, validate=True), message)
        except (InvalidSignature, binascii.Error):
            yield Signed(name, "tampered", f"the signature of {name} is of another manifest")
            continue
        if key.revoked is not None:
            yield Signed(name, "revoked", f"{name} was revoked{key.revoked}")
        elif trusted.has_krl:
            yield Signed(name, "not checked", f"the signature of {name} is not checked against a KRL: sign again")
        else:
            yield Signed(name, "signed", f"signed by {name}")
