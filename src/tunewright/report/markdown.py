"""The verdict as GitHub Markdown for a pull request comment: a pure function of the evidence."""

from __future__ import annotations

from tunewright.evidence.benchmarks import standing
from tunewright.evidence.causes import ProjectFacts, decided
from tunewright.evidence.schema import Evidence
from tunewright.render.markdown import markdown, plain
from tunewright.report.sections import evaluation
from tunewright.report.text import headline, verdict_blocks


def verdict_markdown(evidence: Evidence, known: ProjectFacts | None = None) -> str:
    """Return the verdict with its reasons, causes and measurements, and the inputs of the evaluation.

    Text from users is always shown literally: it cannot add markup, notify anybody or link to an issue.
    """
    result = decided(evidence, known)
    measured, *reasons = result.reasons
    below = set(standing(evidence.regressions).reasons) if evidence.regressions else set()
    blocks = [
        f"## {headline(result)}: {plain(evidence.project)}",
        plain(measured),
        *markdown(
            *verdict_blocks(result, [reason for reason in reasons if reason not in below]),
            *evaluation.sections(evidence),
        ),
        _made_with(evidence),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _made_with(evidence: Evidence) -> str:
    """Return the identifiers to check the comment against: the evidence's ID and digests of its inputs."""
    lineage = evidence.lineage
    parts = [f"Evidence {plain(evidence.id)}"]
    for name in ("created", "dataset", "base", "adapter"):
        value = lineage.get(name)
        digest = value.get("digest") if isinstance(value, dict) else value
        if isinstance(digest, str):
            parts.append(f"{name} {plain(digest if name == 'created' else digest[:12])}")
    if evidence.engine is not None:
        parts.append(f"engine {plain(evidence.engine.text)}")
    return f"{', '.join(parts)}; margin {100 * evidence.margin:g} points."
