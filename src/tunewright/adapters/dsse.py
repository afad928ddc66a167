"""Signatures of adapters in the format of earlier versions, verified until tunewright 2.0 and no longer made.

``signature.json`` is a DSSE envelope (github.com/secure-systems-lab/dsse, v1.0.2) without its payload, which is the
file ``manifest.json``: payload type, and each signer's key ID and Ed25519 signature. Keys are those of keys/NAME.json.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from tunewright.adapters.keys import TrustedKey, TrustedKeys
from tunewright.adapters.manifest import DSSE, Digest, Record, Signed, parse_record

PAYLOAD_TYPE: Final = "application/vnd.tunewright.adapter+json"


class Signature(Record):
    """One signer's key ID, and 64 bytes in base64."""

    keyid: Digest
    sig: Annotated[str, Field(max_length=100)]


class Envelope(Record):
    """All signatures over one manifest, in the order in which they were made."""

    payloadType: Literal["application/vnd.tunewright.adapter+json"] = PAYLOAD_TYPE  # noqa: N815 (DSSE spells it so)
    signatures: Annotated[tuple[Signature, ...], Field(min_length=1, max_length=16)]


def verify_signatures(folder: Path, payload: bytes, trusted: TrustedKeys) -> Iterator[Signed]:
    """Yield the status of each signature over the manifest in ``folder``, whose bytes are ``payload``.

    Raises:
        UserError: they cannot be read.
    """
    path = folder / DSSE
    if not path.is_file():
        return
    kind = PAYLOAD_TYPE.encode()
    # DSSE signs the payload and its type, each with its length, so that they cannot be confused.
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    for signature in parse_record(Envelope, path.read_bytes(), str(path)).signatures:
        key = next((known for known in trusted.all if known.id == signature.keyid), None)
        mark = signature.keyid[:16]
        if key is None:
            yield Signed(mark, "untrusted", f"signed by key {mark}, which is not trusted here")
        elif not _holds(key, signature, message):
            yield Signed(key.name, "tampered", f"the signature of {key.name} is of another manifest")
        elif key.revoked is not None:
            yield Signed(key.name, "revoked", f"{key.name} was revoked{key.revoked}")
        elif trusted.has_krl:
            yield Signed(
                key.name, "not checked", f"the signature of {key.name} is not checked against a KRL: sign again"
            )
        else:
            yield Signed(key.name, "signed", f"signed by {key.name}")


def _holds(key: TrustedKey, signature: Signature, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    raw = base64.b64decode(key.openssh.split()[1])[-32:]
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(base64.b64decode(signature.sig, validate=True), message)
    except (InvalidSignature, binascii.Error):
        return False
    return True
