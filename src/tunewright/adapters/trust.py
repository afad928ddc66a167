"""Whether a stored adapter is what was stored, and who stands for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.manifest import changes, make_manifest, read_manifest
from tunewright.adapters.registry import WEIGHTS, Adapter, adapter_digest
from tunewright.adapters.signing import weigh
from tunewright.adapters.vllm_compat import weight_faults
from tunewright.core.errors import UserError

State = Literal["signed", "unsigned", "untrusted", "revoked", "tampered"]


@dataclass(frozen=True)
class Standing:
    """What an adapter is worth to a project.

    *signed*: whole, and by a key that the project trusts. *unsigned*, *untrusted*: whole, but who made it cannot be
    told. *revoked*: by a key that is trusted no longer. *tampered*: not what was stored or signed, or not finite.
    """

    adapter: str
    state: State
    keys: tuple[str, ...]
    """Whose signatures it has, by their names in the project, else by the first digits of their IDs."""
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the standing as ``--json`` prints it."""
        return asdict(self)


def standing(adapter: Adapter, trusted: TrustedKeys, *, weights: bool = True) -> Standing:
    """Check every file of an adapter and every signature.

    Args:
        adapter: a stored one.
        trusted: the project's keys.
        weights: also that all weights are finite, which reads them.
    """
    try:
        faults = _faults(adapter, weights=weights)
        signed = [] if read_manifest(adapter.folder) is None else weigh(adapter.folder, trusted)
    except UserError as error:
        return Standing(adapter.name, "tampered", (), (str(error).partition("\n")[0],))
    keys = tuple(each.key for each in signed)
    faults += [each.why for each in signed if each.worth == "tampered"]
    if faults:
        return Standing(adapter.name, "tampered", keys, tuple(faults))
    for state in ("signed", "revoked", "untrusted"):
        if told := [each.why for each in signed if each.worth == state]:
            return Standing(adapter.name, state, keys, tuple(told))
    return Standing(adapter.name, "unsigned", (), ("no signature",))


def _faults(adapter: Adapter, *, weights: bool) -> list[str]:
    """Return what is not as it was stored."""
    manifest = read_manifest(adapter.folder)
    lineage = adapter.lineage
    if manifest is None:  # an earlier tunewright stored it
        adapter.verify()
        faults = []
    else:
        faults = changes(adapter.folder, manifest)
        if manifest.name != adapter.name:
            faults.append(f"its manifest is that of {manifest.name}")
        if not faults and make_manifest(adapter.folder, adapter.name, lineage) != manifest:
            faults = ["the manifest and the lineage name different things"]
        if not faults and adapter_digest(adapter.folder) != manifest.digest:
            faults = ["its digest is not that of its weights and configuration"]
    if weights and not faults:
        places = (adapter.folder, *adapter.checkpoints.values())
        faults = [fault for place in places for fault in weight_faults(place / WEIGHTS)]
    return faults


def require_sound(adapter: Adapter, trusted: TrustedKeys) -> None:
    """Refuse an adapter that was changed, or whose key was revoked; where the project trusts keys, one without theirs.

    Raises:
        UserError: saying which.
    """
    found = standing(adapter, trusted, weights=False)
    if found.state == "signed" or (found.state in ("unsigned", "untrusted") and not trusted.valid):
        return
    fix = {
        "unsigned": f"If you stand for it: tunewright adapters sign {adapter.name}",
        "untrusted": "If you trust who signed it: tunewright keys trust FILE",
        "revoked": "Train again, or sign it anew if you stand for it: tunewright adapters sign",
        "tampered": "Remove the folder, and train or import it again.",
    }[found.state]
    why = "; ".join(found.reasons)
    if found.state in ("unsigned", "untrusted"):
        why += ", and this project trusts keys"
    raise UserError(f"it is {found.state}: {why}", where=adapter.name, fix=fix)
