"""Building blocks of the evidence's sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A part of the evidence: frozen, with finite numbers and no extra keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Interval(Part):
    """A 95% interval in the metric's own unit (shares from 0 to 1)."""

    low: float
    high: float


class Score(Part):
    """A value with its interval, as a share from 0 to 1 (a corpus BLEU of 43.2 is 0.432)."""

    value: float
    interval: Interval
    method: Annotated[str, Field(description="Method of the interval, e.g. 'Wilson'.")]


class References(Part):
    """Counts of references, for inputs that occur in several rows with different outputs."""

    items: int
    inputs: Annotated[int, Field(description="Distinct inputs, ignoring case and white space.")]
    several: Annotated[int, Field(description="Inputs with more than one reference.")]
    references: Annotated[int, Field(description="Distinct outputs, summed over inputs.")]

    @property
    def text(self) -> str:
        """Text such as ``5 distinct inputs with 6.0 references each``, to follow ``30 test items``."""
        inputs = f"{self.inputs:,} distinct input{'' if self.inputs == 1 else 's'}"
        if self.several == self.inputs:
            return f"{inputs} with {self.references / self.inputs:.1f} references each"
        return f"{inputs} with {self.references / self.inputs:.1f} references on average"


class ArmScore(Score):
    """One arm's score by one metric, with the number of scored items."""

    scored: Annotated[int, Field(description="Items that were scored.")]
    unscored: Annotated[dict[str, int], Field(description="Reason to number of unscored items.")]
    outside: Annotated[
        int, Field(description="Answers outside the declared choices, counted as wrong; 0 with other metrics.")
    ] = 0


class NoiseFloor(Part):
    """Differences between two runs of the base on the same items in different batches.

    In low precision the batch affects the order of additions, and so which of two nearly tied tokens wins (Yuan et al.
    2025, arXiv 2506.09501). A difference between arms that is not larger than this noise shows nothing.
    """

    items: Annotated[int, Field(description="Test items with distinct prompts, sampled by the seed.")]
    changed: Annotated[int, Field(description="Items whose second answer differs from the first.")]
    score_difference: Annotated[float, Field(description="Second score minus the first, by the deciding metric.")]
    how: Annotated[str, Field(description="The difference between the two runs.")]


class EngineUsed(Part):
    """The engine of all arms and of the noise floor, recorded because engines round differently."""

    name: Annotated[Literal["peft", "vllm"], Field(description="peft: the built-in loop over transformers and peft.")]
    version: Annotated[str, Field(description="Version of the package with the engine's name.")]
    packages: Annotated[dict[str, str], Field(description="Versions in the engine's environment that affect numbers.")]
    device: Annotated[str, Field(description="cpu or cuda.")]
    dtype: str
    rows: Annotated[int, Field(description="Maximum number of answers decoded at once.")]
    why: Annotated[str, Field(description="Reason for this engine: evaluate.engine, and the engines installed.")]

    @property
    def text(self) -> str:
        """Name, version, device and precision, for display."""
        return f"{self.name} {self.version} ({self.device}, {self.dtype})"


RULE = (
    "left out first: the adapter with demonstrations, an optimized prompt or a grammar, which decides nothing; then "
    "the prompting arms with the most demonstrations, of equal numbers static before retrieved and the later before "
    "the earlier; last, other instructions and grammars zero-shot. Never left out: zero-shot, the retrieved arm with "
    "the fewest demonstrations, tuned, any item, and arms that would save no time, since their answers are all there"
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
