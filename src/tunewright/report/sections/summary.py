"""The top of the page: the verdict, four numbers, and an explanation."""

from __future__ import annotations

from dataclasses import dataclass

from tunewright.evidence.causes import ProjectFacts, decided
from tunewright.evidence.schema import Evidence
from tunewright.evidence.verdict import Decision, changed_words
from tunewright.metrics import points_text, score_text
from tunewright.render.blocks import Block
from tunewright.report.text import headline, verdict_blocks

_TONES: dict[Decision, str] = {"ship": "ship", "don't ship": "dont", "can't tell": "open"}


@dataclass(frozen=True)
class Number:
    """A number in large print with its label."""

    value: str
    what: str
    tone: str = ""


@dataclass(frozen=True)
class Summary:
    """The verdict at a glance."""

    headline: str
    tone: str
    measured: str
    """The measurement in plain words."""
    made: str
    """Date, author, base and data set of the measurement."""
    reasons: tuple[Block, ...]
    """The reasons, and likely causes."""
    numbers: tuple[Number, ...]
    meaning: str


def summary(evidence: Evidence, known: ProjectFacts | None = None) -> Summary:
    """Return the verdict with its causes, and the deciding contrast."""
    result, first = decided(evidence, known), evidence.contrasts[0]
    treatment, control = evidence.arm(first.treatment), evidence.arm(first.control)
    better, worse = changed_words(evidence, first.metric)
    return Summary(
        headline=headline(result),
        tone=_TONES[result.decision],
        measured=result.summary,
        made=_made(evidence),
        reasons=verdict_blocks(result, result.reasons),
        numbers=(
            Number(score_text(evidence.metric, treatment.score(evidence.metric).value), treatment.name, "tuned"),
            Number(
                score_text(evidence.metric, control.score(evidence.metric).value),
                f"{control.name}, the best prompting",
                "" if control.kind == "zero-shot" else "prompting",
            ),
            Number(points_text(first.difference), "points between them"),
            Number(f"{first.fixed} / {first.broken}", f"items {better} / {worse}"),
        ),
        meaning=_meaning(evidence),
    )


def _made(evidence: Evidence) -> str:
    lineage = evidence.lineage
    facts = {
        "on": str(lineage.get("created", ""))[:10],
        "by": evidence.opening.author if evidence.opening else None,
        "with the base": lineage.get("base", {}).get("spec"),
        "on data set": f"{evidence.project} (version {str(lineage.get('dataset', 'unknown'))[:12]})",
    }
    return f"Measured {', '.join(f'{word} {fact}' for word, fact in facts.items() if fact)}."


def _meaning(evidence: Evidence) -> str:
    """Explain the deciding contrast in terms of a hundred requests."""
    first = evidence.contrasts[0]
    if evidence.metrics[first.metric].kind == "right or wrong":
        ours, theirs = (evidence.arm(name).score(first.metric).value for name in (first.treatment, first.control))
        better, worse = 100 * first.fixed / first.scored, 100 * first.broken / first.scored
        return (
            f"What it means: of 100 requests like these, {first.treatment} would get about {100 * ours:.0f} right and "
            f"{first.control} about {100 * theirs:.0f}. About {better:.0f} would become right by tuning, and about "
            f"{worse:.0f} wrong."
        )
    same = first.scored - first.fixed - first.broken
    return (
        f"What it means: of these {first.scored:,} items{_inputs(evidence)}, {first.fixed:,} were answered better by "
        f"{first.treatment} than by {first.control}, {first.broken:,} worse, and {same:,} as well."
    )


def _inputs(evidence: Evidence) -> str:
    """Explain that rows of one input count as several items but one request."""
    return f" ({evidence.references.text})" if evidence.references else ""
