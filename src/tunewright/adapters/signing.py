"""Signatures over an adapter's manifest.

``signature.json`` is a DSSE envelope (github.com/secure-systems-lab/dsse, v1.0.2) without its payload, which is the
file ``manifest.json`` itself: payload type, and each signer's key ID and Ed25519 signature.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.manifest import MANIFEST, SIGNATURE, Digest, Record, parse_record
from tunewright.adapters.private_keys import PrivateKey, private_key, private_keys
from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.core.progress import Reporter

PAYLOAD_TYPE: Final = "application/vnd.tunewright.adapter+json"


class Signature(Record):
    """One signer's key ID, and 64 bytes in base64."""

    keyid: Digest
    sig: Annotated[str, Field(max_length=100)]


class Envelope(Record):
    """All signatures over one manifest, in the order in which they were made."""

    payloadType: Literal["application/vnd.tunewright.adapter+json"] = PAYLOAD_TYPE  # noqa: N815 (DSSE spells it so)
    signatures: Annotated[tuple[Signature, ...], Field(min_length=1, max_length=16)]


@dataclass(frozen=True)
class Signed:
    """The status of one signature in a project."""

    key: str
    """The key's name in the project, or the first digits of its ID if it is unknown there."""
    status: Literal["signed", "untrusted", "revoked", "tampered"]
    why: str


def signed_bytes(payload: bytes) -> bytes:
    """Return the bytes that DSSE signs: the payload and its type, each with its length, so that they cannot be
    confused.
    """
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign(folder: Path, key: PrivateKey) -> bool:
    """Add a signature over the manifest in ``folder``; return False if this key has signed it already.

    The key must be unlocked unless it has.

    Raises:
        UserError: the existing signatures, or the key, cannot be read.
    """
    if has_signed(folder, key):
        return False
    existing = read_signatures(folder)
    made = key.sign(signed_bytes((folder / MANIFEST).read_bytes()))
    envelope = Envelope(signatures=(*existing, Signature(keyid=key.id, sig=base64.b64encode(made).decode())))
    write_json(folder / SIGNATURE, envelope.model_dump(mode="json"))
    return True


def has_signed(folder: Path, key: PrivateKey) -> bool:
    """Return whether one of the folder's signatures names this key.

    Raises:
        UserError: the signatures, or the key, cannot be read.
    """
    return any(signature.keyid == key.id for signature in read_signatures(folder))


def read_signatures(folder: Path) -> tuple[Signature, ...]:
    """Return the signatures in an adapter's folder; empty if it is unsigned.

    Raises:
        UserError: they cannot be read.
    """
    path = folder / SIGNATURE
    if not path.is_file():
        return ()
    return parse_record(Envelope, path.read_bytes(), str(path)).signatures


def verify_signatures(folder: Path, trusted: TrustedKeys) -> list[Signed]:
    """Return the status of each signature over the manifest in ``folder``, for a project with these keys.

    Raises:
        UserError: the signatures cannot be read.
    """
    return [_verify(signature, (folder / MANIFEST).read_bytes(), trusted) for signature in read_signatures(folder)]


def _verify(signature: Signature, payload: bytes, trusted: TrustedKeys) -> Signed:
    key = trusted.find(signature.keyid)
    if key is None:
        return Signed(
            signature.keyid[:16], "untrusted", f"signed by key {signature.keyid[:16]}, which is not trusted here"
        )
    try:
        holds = key.verifies(base64.b64decode(signature.sig, validate=True), signed_bytes(payload))
    except binascii.Error:
        holds = False
    if not holds:
        return Signed(key.name, "tampered", f"the signature of {key.name} is of another manifest")
    if key.revoked is not None:
        return Signed(key.name, "revoked", f"{key.name} was revoked on {key.revoked.at}: {key.revoked.because}")
    return Signed(key.name, "signed", f"signed by {key.name}")


def store_signer(keys: Path, reporter: Reporter) -> PrivateKey | None:
    """Return the key that signs stored adapters by default, unlocked; report it, or the reason for its absence.

    A user without keys gets no report: signing is not in use.

    Args:
        keys: the project's folder of trusted keys.
        reporter: reports the key or the reason, and asks for the passphrase.

    Raises:
        UserError: the key cannot be unlocked.
    """
    if not private_keys():
        return None
    try:
        key = signing_key(TrustedKeys(keys))
    except UserError as error:
        reporter.say(f"The adapter will not be signed: {error.what}. {error.fix}")
        return None
    unlocked = key.unlock(reporter)
    reporter.say(f"The adapter will be signed with your key {key.name}.")
    return unlocked


def signing_key(trusted: TrustedKeys, name: str | None = None) -> PrivateKey:
    """Return the key that signs in a project: the named one, or the only one of the user's keys that the project
    trusts.

    Raises:
        UserError: no key, several keys, or a key that the project does not trust.
    """
    valid = {key.id: key.name for key in trusted.valid}
    if name is not None:
        key = private_key(name)
        if key.id not in valid:
            raise UserError(
                f"This project does not trust your key {name!r}",
                where=str(trusted.folder),
                fix=f"Trust it first: tunewright keys trust {name}",
            )
        return key
    own = private_keys()
    if not own:
        raise UserError("You have no key to sign with", fix="Create one: tunewright keys create NAME")
    usable = [key for key in own if key.id in valid]
    names = ", ".join(key.name for key in usable or own)
    if not usable:
        fix = f"Trust one: tunewright keys trust {own[0].name}"
        raise UserError(f"This project trusts none of your keys ({names})", where=str(trusted.folder), fix=fix)
    if len(usable) > 1:
        raise UserError(f"Several of your keys could sign ({names})", where="--key", fix="Choose one with --key.")
    return usable[0]
