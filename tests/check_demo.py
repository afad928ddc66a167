"""Runs the whole demo through the command line and holds it to what the README says of it (16 minutes on two cores).

python tests/check_demo.py DIRECTORY
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


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
    (samples,) = evidence["general"]["suites"]
    assert samples["kind"] == "samples" and samples["interval"]["low"] < samples["drop"], samples
    assert Path(result["report"]).stat().st_size > 10_000
    assert len(result["served"]["answers"]) == 3
    assert all(result["served"]["answers"].values())
    tuned = next(arm for arm in evidence["arms"] if arm["name"] == "tuned")
    sys.stdout.write(
        f"tuned {tuned['scores'][evidence['metric']]['value']:.1%} of {tuned['items']}; tuned - {decisive['control']} "
        f"{100 * decisive['difference']:+.1f} points, 95% interval {100 * decisive['interval']['low']:+.1f} to "
        f"{100 * decisive['interval']['high']:+.1f}\n"
    )


if __name__ == "__main__":
    main(sys.argv[1])
