"""What `advise` gives back, and as JSON; readable without torch or the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tunewright.advisor.decision import Decision, decide
from tunewright.advisor.signals import Signals
from tunewright.advisor.wording import changes, expectations, measured


@dataclass(frozen=True)
class AdviceResult:
    """What `advise` measured or found, and what follows from it."""

    file: Path
    signals: Signals
    measured: bool
    """False when the same had been measured before."""

    @cached_property
    def decision(self) -> Decision:
        """What to do."""
        return decide(self.signals)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as ``--json`` prints it."""
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
