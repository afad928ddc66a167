"""Check every pinned package against published security advisories.

python tests/check_advisories.py AUDIT_TOOL [optional]

``AUDIT_TOOL`` is pip-audit. It reports a package that it could not look up, and an index without advisories, as nothing
found. So a package with known advisories is looked up first, and a package that was skipped fails the check. Without
advisories it fails, unless ``optional`` is given: then it says that nothing was checked.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PINS = (ROOT / "constraints.txt", *sorted((ROOT / "src" / "tunewright" / "engines" / "vllm").glob("*.txt")))
KNOWN = "jinja2==2.10"
"""CVE-2019-10906 and later ones."""
SERVICES = ("pypi", "osv")


def main(tool: str, optional: bool) -> int:
    """Return the exit code: 0 if nothing is known about any pin, or nothing could be checked and that is allowed."""
    service = next((each for each in SERVICES if is_answering(tool, each)), None)
    if service is None:
        say(
            f"NOT AUDITED: neither of {', '.join(SERVICES)} has the known advisories on {KNOWN}. Run this where their "
            "addresses can be reached."
        )
        return 0 if optional else 1
    failed = False
    for pins in PINS:
        text = pins.read_text(encoding="utf-8")
        found = audit(tool, service, text)
        problems = [problem for package in found for problem in problems_of(package)]
        if len(found) != (count := len(re.findall(r"^[\w.-]+==", text, re.MULTILINE))):
            problems.append(f"{pins.name}: {len(found)} of {count} packages were checked")
        name = pins.relative_to(ROOT)
        say("\n".join(problems) if problems else f"{name}: no advisory on {len(found)} packages ({service}).")
        failed |= bool(problems)
    return int(failed)


def problems_of(package: dict[str, Any]) -> list[str]:
    """Return a line for each advisory on a package, or one if it was not checked."""
    if "skip_reason" in package:
        return [f"{package['name']}: not checked: {package['skip_reason']}"]
    return [
        f"{package['name']} {package['version']}: {each['id']}, fixed in {', '.join(each['fix_versions']) or 'none'}"
        for each in package["vulns"]
    ]


def is_answering(tool: str, service: str) -> bool:
    """Return whether the service has the advisories that it must have."""
    return any(package.get("vulns") for package in audit(tool, service, KNOWN))


def audit(tool: str, service: str, pins: str) -> list[dict[str, Any]]:
    """Return pip-audit's report on pins; empty if it could not make one."""
    options = ["--disable-pip", "--no-deps", "--progress-spinner", "off", "-f", "json", "-s", service]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        # Advisories are on public versions: torch 2.13.0, not its build 2.13.0+cpu.
        file.write(re.sub(r"\+\w+", "", pins))
        file.flush()
        ran = subprocess.run([tool, *options, "-r", file.name], capture_output=True, text=True, check=False)
    try:
        found: list[dict[str, Any]] = json.loads(ran.stdout)["dependencies"]
    except ValueError:
        say(f"{service}: {(ran.stderr.strip().splitlines() or ['no answer'])[-1]}")
        return []
    return found


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:] == ["optional"]))
