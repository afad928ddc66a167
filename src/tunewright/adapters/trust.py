"""Trust in a stored adapter: its integrity and its signatures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.manifest import changed_files, make_manifest, read_manifest
from tunewright.adapters.registry import WEIGHTS, Adapter, adapter_digest
from tunewright.adapters.signing import verify_signatures
from tunewright.adapters.vllm_compat import weight_faults
from tunewright.core.errors import UserError

State = Literal["signed", "unsigned", "untrusted", "not checked", "revoked", "tampered"]


@dataclass(frozen=True)
class TrustStatus:
    """An adapter's trust status in a project.

    *signed*: intact, with a signature of a key that the project trusts. *unsigned*, *untrusted*: intact, but its maker
    is not verified. *not checked*: intact, but without ``ssh-keygen`` nobody knows whether its signature is valid.
    *revoked*: signed with a revoked key. *tampered*: changed since it was stored or signed, or not finite.
    """

    adapter: str
    state: State
    keys: tuple[str, ...]
    """The signing keys, by their names in the project, else by their fingerprints."""
    reasons: tuple[str, ...]


def trust_status(adapter: Adapter, trusted: TrustedKeys, *, weights: bool = True) -> TrustStatus:
    """Check every file and signature of a stored adapter; with ``weights`` also that its numbers are finite."""
    try:
        faults = _faults(adapter, weights=weights)
        signed = [] if read_manifest(adapter.folder) is None else verify_signatures(adapter.folder, trusted)
    except UserError as error:
        return TrustStatus(adapter.name, "tampered", (), (str(error).partition("\n")[0],))
    keys = tuple(each.key for each in signed)
    faults += [each.why for each in signed if each.status == "tampered"]
    if faults:
        return TrustStatus(adapter.name, "tampered", keys, tuple(faults))
    for state in ("signed", "revoked", "not checked", "untrusted"):
        if reasons := [each.why for each in signed if each.status == state]:
            return TrustStatus(adapter.name, state, keys, tuple(reasons))
    return TrustStatus(adapter.name, "unsigned", (), ("no signature",))


def _faults(adapter: Adapter, *, weights: bool) -> list[str]:
    """Return the changes since the adapter was stored."""
    manifest = read_manifest(adapter.folder)
    lineage = adapter.lineage
    if manifest is None:  # an earlier tunewright stored it
        adapter.verify()
        faults = []
    else:
        faults = changed_files(adapter.folder, manifest)
        if manifest.name != adapter.name:
            faults.append(f"the manifest names {manifest.name}")
        if not faults and make_manifest(adapter.folder, adapter.name, lineage) != manifest:
            faults = ["the manifest and the lineage disagree"]
        if not faults and adapter_digest(adapter.folder) != manifest.digest:
            faults = ["the digest does not match the weights and configuration"]
    if weights and not faults:
        places = (adapter.folder, *adapter.checkpoints.values())
        faults = [fault for place in places for fault in weight_faults(place / WEIGHTS)]
    return faults


def require_trusted(adapter: Adapter, trusted: TrustedKeys) -> None:
    """Refuse an adapter that has changed or whose key is revoked; if the project trusts keys, also one without their
    signature.
    """
    found = trust_status(adapter, trusted, weights=False)
    unproven = found.state in ("unsigned", "untrusted", "not checked")
    if found.state == "signed" or (unproven and not trusted.required):
        return
    fix = {
        "unsigned": f"If you vouch for it: tunewright adapters sign {adapter.name}",
        "untrusted": "If you trust the signer: tunewright keys trust FILE",
        "not checked": "Install OpenSSH 8.2 or later, or sign it again: tunewright adapters sign",
        "revoked": "Train again, or sign it again if you vouch for it: tunewright adapters sign",
        "tampered": "Remove the folder, and train or import it again.",
    }[found.state]
    why = "; ".join(found.reasons)
    if unproven:
        why += ", and this project requires a trusted signature"
    raise UserError(f"The adapter is {found.state}: {why}", where=adapter.name, fix=fix)
