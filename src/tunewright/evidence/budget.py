"""The evidence's record of a time budget: the arms left out, and the rule."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunewright.evidence.base import Part

RULE = (
    "left out first: the adapter with demonstrations or a grammar, which decides nothing; then the prompting arms with "
    "the most demonstrations, of equal numbers static before retrieved and the later before the earlier; last, other "
    "instructions and grammars zero-shot. Never left out: zero-shot, the retrieved arm with the fewest demonstrations, "
    "tuned, any item, and arms that would save no time, since their answers are all there"
)


class Budget(Part):
    """Arms that ``--minutes`` left out."""

    minutes: Annotated[float, Field(description="The value of --minutes.")]
    expected: Annotated[float, Field(description="Estimated minutes of the remaining arms, from the measured speed.")]
    left_out: Annotated[tuple[str, ...], Field(description="Arms left out, in this order.")]
    rule: Annotated[str, Field(description="The rule that orders the arms to leave out, in words.")] = RULE

    @property
    def prompting(self) -> tuple[str, ...]:
        """The prompting arms left out, which weakens the baseline."""
        return tuple(name for name in self.left_out if not name.startswith("tuned"))

    @property
    def why(self) -> str:
        """The reason for one arm, phrased to follow the arm's name."""
        return f"--minutes {self.minutes:g} has no time for it"

    @property
    def caution(self) -> str | None:
        """The caution that a verdict must carry; None if no prompting arm was left out."""
        if not self.prompting:
            return None
        return (
            f"Prompting was not tried as hard as usual: --minutes {self.minutes:g} left out {len(self.prompting)} "
            f"prompting arms ({', '.join(self.prompting)}). The best prompt may be better than the one compared here."
        )
