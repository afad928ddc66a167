"""An adapter with its lineage, its trust status and its evaluations: ``tunewright adapters show``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.lineage import Trace, trace
from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.adapters.trust import TrustStatus, trust_status
from tunewright.core.errors import UserError
from tunewright.evaluation.access_log import AccessLog
from tunewright.evidence.files import EVIDENCE_FILE
from tunewright.evidence.verdict import Decision, verdict
from tunewright.open_project import OpenProject


@dataclass(frozen=True)
class AdapterDetails:
    """An adapter with its lineage, trust status and evaluation verdicts."""

    trace: Trace
    standing: TrustStatus
    verdicts: tuple[tuple[str, Decision], ...]
    """Evaluation IDs with their decisions, newest last."""

    def as_dict(self, *, rows: bool) -> dict[str, Any]:
        """Return the result as ``--json`` prints it, optionally with the rows' keys."""
        evaluations = [{"id": name, "decision": decision} for name, decision in self.verdicts]
        return {**self.trace.as_dict(rows=rows), "standing": self.standing, "evaluations": evaluations}


def show(project: OpenProject, adapter: str | None = None) -> AdapterDetails:
    """Return an adapter's lineage down to the rows, its trust status and its verdicts.

    Args:
        adapter: a name or its beginning (None: the newest).

    Raises:
        UserError: no such adapter.
    """
    found = find_adapter(project.folder.adapters, adapter)
    return AdapterDetails(
        trace(found, project.folder.dataset),
        trust_status(found, TrustedKeys(project.folder.keys)),
        tuple(_verdicts(project, found)),
    )


def _verdicts(project: OpenProject, adapter: Adapter) -> Sequence[tuple[str, Decision]]:
    """Return the decision of each evaluation of the adapter; skip unreadable or changed evidence with a warning."""
    found = []
    for path in project.folder.evaluations.glob(f"*/{EVIDENCE_FILE}"):
        try:
            evidence = AccessLog(project.folder.evaluations).load(path.parent)
        except UserError as error:
            project.reporter.warn(f"{path.parent.name} is skipped: {error.what.splitlines()[0]}")
            continue
        if evidence.lineage.get("adapter", {}).get("digest") == adapter.digest:
            found.append((str(evidence.lineage["created"]), evidence.id, verdict(evidence).decision))
    return [(name, decision) for _, name, decision in sorted(found)]
