"""The sections of an evaluation in the order in which the terminal, a comment and the studio show them."""

from __future__ import annotations

from tunewright.evidence.schema import Evidence
from tunewright.render.blocks import Section
from tunewright.report.sections import arms, benchmarks, contrasts, incumbents, prompting


def sections(evidence: Evidence) -> list[Section]:
    """Return folds, arms, contrasts, incumbents and regression benchmarks, as far as they were measured."""
    found = (
        prompting.folds_section(evidence),
        arms.section(evidence),
        contrasts.section(evidence),
        incumbents.section(evidence),
        benchmarks.section(evidence.regressions) if evidence.regressions else None,
    )
    return [section for section in found if section is not None]
