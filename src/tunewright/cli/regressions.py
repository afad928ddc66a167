"""``regressions``: whether the base's general abilities survived the fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunewright.cli.app import EVALUATE, Adapter, app, command
from tunewright.cli.console import RESUMES, Session

if TYPE_CHECKING:
    from tunewright.evaluation.benchmarks.runner import BenchmarkResult


@command(
    app, "regressions", panel=EVALUATE, cluster=True, example="tunewright regressions legal-4f1c02a9", kept=RESUMES
)
def regressions(run: Session, adapter: Adapter = None) -> int:
    """Compare general abilities without and with the adapter: not worse (exit code 0), worse (3) or can't tell (4).

    The suites are those of the config's `regressions` section; `evaluate` measures them too. Resumes where it stopped.
    """
    from tunewright.evidence.benchmarks import benchmarks_section

    result = run.project.regressions(adapter)
    standing = result.standing
    evidence = (
        f"In the evidence: {result.folder}"
        if result.folder
        else "`tunewright evaluate` adds it to the adapter's evidence, once there is some."
    )
    run.show(regressions_document(result), benchmarks_section(result.benchmarks), *standing.reasons, evidence)
    return standing.exit_code


def regressions_document(result: BenchmarkResult) -> dict[str, Any]:
    """Return the result as JSON."""
    standing = result.standing
    return {
        "adapter": result.adapter.name,
        "measured": result.measured,
        "evaluation": None if result.folder is None else str(result.folder),
        "result": standing.result,
        "decides": standing.decides,
        "reasons": list(standing.reasons),
        "regressions": result.benchmarks.model_dump(mode="json"),
    }
