"""Run the demo through the command line and check what it claims (5 minutes on two free cores).

python tests/check_demo.py DIRECTORY
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def main(directory: str) -> None:
    """Run the demo; fail with what is not as promised."""
    command = [str(Path(sys.executable).with_name("tunewright")), "demo", directory, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
    result = json.loads(done.stdout)
    assert done.returncode == 0, f"exit code {done.returncode}: {result}"
    evidence = result["evidence"]
    decisive = evidence["contrasts"][0]
    assert (decisive["treatment"], decisive["control"]) == ("tuned", evidence["best_prompting"])
    assert decisive["interval"]["low"] > evidence["margin"], decisive
    assert result["verdict"]["decision"] == "ship", result["verdict"]
    assert (evidence["split"], evidence["design"]) == ("test", "held-out") and evidence["items"] >= 150, evidence
    answers = result["served"]["answers"]
    assert answers[result["adapter"]] == result["served"]["reference"] != result["served"]["prompted"], result["served"]
    (samples,) = evidence["regressions"]["suites"]
    assert samples["kind"] == "samples" and samples["interval"]["low"] < samples["drop"], samples
    assert Path(result["report"]).stat().st_size > 10_000
    assert len(answers) == 3
    assert all(answers.values())
    check_tenants(result)
    tuned = next(arm for arm in evidence["arms"] if arm["name"] == "tuned")
    sys.stdout.write(
        f"tuned {tuned['scores'][evidence['metric']]['value']:.1%} of {tuned['items']}; tuned - {decisive['control']} "
        f"{100 * decisive['difference']:+.1f} points, 95% interval {100 * decisive['interval']['low']:+.1f} to "
        f"{100 * decisive['interval']['high']:+.1f}\n"
    )


def check_tenants(result: dict[str, Any]) -> None:
    """Two tenants on one base, each of whom sees and reaches only its own; both releases passed the isolation test."""
    shown = result["tenants"]
    first, second = shown["tenants"]
    assert (first["sees"], second["sees"]) == (["legal"], ["legal-draft"]), shown
    live = {release["alias"]: release for release in shown["releases"]}
    for visit in (first, second):
        assert visit["answered_by"] == live[visit["alias"]]["digest"], visit
        assert (visit["others_alias"], visit["same_refusal"]) == (404, True), visit
        assert visit["answer"] and visit["requests"] and visit["tokens"], visit
    assert first["answered_by"] != second["answered_by"]
    grounds = {alias: release["grounds"] for alias, release in live.items()}
    assert all(each["isolation"]["verdict"] == "isolated" for each in grounds.values()), grounds
    assert (grounds["legal"]["verdict"], grounds["legal"]["because"]) == ("ship", None), grounds
    assert grounds["legal-draft"]["because"], "the second one is forced, and says why"


if __name__ == "__main__":
    main(sys.argv[1])
