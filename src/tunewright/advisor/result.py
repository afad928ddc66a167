"""The result of `advise`, also as JSON; readable without torch or the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tunewright.advisor.decision import Decision, decide
from tunewright.advisor.explanations import changes, expectations, measured
from tunewright.advisor.signals import Signals


@dataclass(frozen=True)
class AdviceResult:
    """Signals that `advise` measured or loaded, with the decision that follows."""

    file: Path
    signals: Signals
    measured: bool
    """False if the signals were stored before."""

    @cached_property
    def decision(self) -> Decision:
        """The recommended approach."""
        return decide(self.signals)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        decision = self.decision
        return {
            "file": str(self.file),
            "measured": self.measured,
            "answer": decision.answer,
            "arm": decision.arm,
            "why": decision.why,
            "signals": measured(self.signals),
            "changes": changes(self.signals, decision),
            "expect": expectations(self.signals),
            "advice": self.signals.model_dump(mode="json"),
        }
